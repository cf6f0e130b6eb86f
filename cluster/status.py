"""`model1 status`: what a gateway says about its deployment."""

import json
from collections.abc import Iterable

from google.protobuf import json_format

from cluster.client import connected
from cluster.output import text_table
from protos import control_pb2

MEMBER_HEADER = ("role", "name", "pid", "address", "state", "requests")


async def status(endpoint: str, *, as_json: bool) -> None:
    async with connected(endpoint) as client:
        server = await client.server_info()
        model = await client.model_info()
        topology = await client.topology()
    if as_json:
        described = {
            "endpoint": endpoint,
            "server": _as_dict(server),
            "model": _as_dict(model),
            "topology": _as_dict(topology),
        }
        print(json.dumps(described, indent=2))
        return
    state = "draining" if server.draining else "serving"
    print(
        f"{endpoint} {state}, version {server.version}, up {server.uptime_seconds:.0f} s, "
        f"{server.active_requests} of {server.max_active_requests} requests active"
    )
    print(
        f"model {model.model_path}, context {model.max_context_length} tokens, "
        f"{model.n_routed_experts} experts, routing epoch {topology.epoch}"
    )
    print(member_table(topology.members))


def member_table(members: Iterable[control_pb2.Member]) -> str:
    rows = [
        (m.role, m.name, m.pid, m.address or "-", m.state, m.requests)
        for m in sorted(members, key=lambda member: (member.role, member.name))
    ]
    return text_table(MEMBER_HEADER, rows)


def _as_dict(
    message: control_pb2.GetServerInfoResponse
    | control_pb2.GetModelInfoResponse
    | control_pb2.GetTopologyResponse,
) -> dict[str, object]:
    described: dict[str, object] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return described
