"""What `model1 kv` makes of stores that did not do as they were told."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from cluster.access import Access
from cluster.client import RequestFailed
from cluster.kv import KvCommand, tier_states, tier_table
from protos import control_pb2, control_pb2_grpc, kvstore_pb2
from services import rpc

WHY = "KV store kvstore-1: it is gone"


class _Gateway(control_pb2_grpc.ControlServicer):
    """Of its two stores one answers."""

    async def VerifyKv(self, request: Any, context: Any) -> control_pb2.VerifyKvResponse:
        verified = kvstore_pb2.KvVerifyResponse(blobs=3)
        return control_pb2.VerifyKvResponse(
            stores=[
                control_pb2.VerifiedStore(store="kvstore-0", verified=verified),
                control_pb2.VerifiedStore(store="kvstore-1", unavailable=WHY),
            ]
        )

    async def EvictKv(self, request: Any, context: Any) -> control_pb2.EvictKvResponse:
        store = control_pb2.EvictedStore(store="kvstore-1", unavailable=WHY)
        return control_pb2.EvictKvResponse(stores=[store])

    async def CollectKv(self, request: Any, context: Any) -> control_pb2.CollectKvResponse:
        store = control_pb2.CollectedStore(store="kvstore-1", unavailable=WHY)
        return control_pb2.CollectKvResponse(stores=[store])


@pytest.mark.parametrize("verb", ["verify", "evict", "collect"])
async def test_a_store_that_did_nothing_is_a_failure(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    register = partial(control_pb2_grpc.add_ControlServicer_to_server, _Gateway())
    service = rpc.Service("model1.v1.Control", register)
    async with await rpc.start_server([service], "127.0.0.1:0") as server:
        command = KvCommand(access=Access(server.address), as_json=False)
        calls: dict[str, Callable[[], Awaitable[None]]] = {
            "verify": partial(command.verify, "disk", repair=False),
            "evict": partial(command.evict, "disk", 1),
            "collect": command.collect,
        }
        with pytest.raises(RequestFailed, match="kvstore-1: it is gone"):
            await calls[verb]()
    assert WHY in capsys.readouterr().out


def test_session_records_are_told_of_when_something_is_wrong_with_them() -> None:
    well, ill = (
        control_pb2.KvStatOfStore(store=name, stat=kvstore_pb2.KvStatResponse(sessions=sessions))
        for name, sessions in (
            ("kvstore-0", kvstore_pb2.KvSessionsStat()),
            ("kvstore-1", kvstore_pb2.KvSessionsStat(degraded="disk I/O error", waiting=3)),
        )
    )
    for table in (tier_table([well, ill]), tier_states([well, ill])):
        row = table.splitlines()[-1]
        assert "kvstore-0" not in table
        assert row.split()[:5] == ["kvstore-1", "sessions", "disk", "I/O", "error"]
