"""`model1 status`: what a gateway says about its deployment."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from cluster.access import Access
from cluster.client import connected
from cluster.figure_tables import autoscale_table, figure_tables
from cluster.figures import figures
from cluster.kv import tier_states
from cluster.output import text_table
from cluster.plain import as_plain
from cluster.readings import Windows
from protos import control_pb2

MEMBER_HEADER = ("role", "name", "pid", "address", "state", "requests", "restarts")


async def status(access: Access, *, as_json: bool) -> None:
    async with connected(access) as client:
        server = await client.server_info()
        model = await client.model_info()
        topology = await client.topology()
        kv = await client.kv_stats()
    told = figures(topology.members, Windows())  # since each process serves
    if as_json:
        for member in topology.members:
            member.ClearField("stats")  # buckets of histograms: the figures are what they say
        described = {
            "endpoint": access.endpoint,
            "server": as_plain(server),
            "model": as_plain(model),
            "topology": as_plain(topology),
            "figures": asdict(told),
            "kv": as_plain(kv),
        }
        print(json.dumps(described, indent=2))
        return
    state = "draining" if server.draining else "serving"
    print(
        f"{access.endpoint} {state}, version {server.version}, up {server.uptime_seconds:.0f} s, "
        f"{server.active_requests} of {server.max_active_requests} requests active"
    )
    print(
        f"model {model.model_path}, context {model.max_context_length} tokens, "
        f"{model.n_routed_experts} experts, routing epoch {topology.epoch}"
    )
    if server.metrics_url:
        print(f"metrics {server.metrics_url}")
    print(member_table(topology.members))
    print(f"\n{figure_tables(told)}")
    if topology.autoscaled:
        print(f"\n{autoscale_table(topology.autoscaled)}")
    if kv.stores:
        print(f"\n{tier_states(kv.stores)}")


def member_table(members: Iterable[control_pb2.Member]) -> str:
    rows = [
        (m.role, m.name, m.pid, m.address or "-", m.state, m.requests, m.restarts)
        for m in sorted(members, key=lambda member: (member.role, member.name))
    ]
    return text_table(MEMBER_HEADER, rows)
