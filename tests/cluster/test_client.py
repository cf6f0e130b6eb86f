"""The command line's client against gateways that misbehave."""

import asyncio
from functools import partial
from typing import Any

import pytest

from cluster import client
from cluster.access import Access
from cluster.client import RequestFailed, connected
from protos import control_pb2_grpc
from services import rpc


class _Hung(control_pb2_grpc.ControlServicer):
    async def GetTopology(self, request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    GetServerInfo = GetModelInfo = GetTopology


@pytest.mark.parametrize("question", ["topology", "server_info", "model_info"])
async def test_a_gateway_that_does_not_answer_is_not_waited_for_for_ever(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CONTROL_TIMEOUT_SECONDS", 0.1)
    register = partial(control_pb2_grpc.add_ControlServicer_to_server, _Hung())
    server = await rpc.start_server([rpc.Service("model1.v1.Control", register)], "127.0.0.1:0")
    try:
        async with asyncio.timeout(30), connected(Access(server.address)) as asked:
            with pytest.raises(RequestFailed, match="DEADLINE_EXCEEDED"):
                await getattr(asked, question)()
    finally:
        await server.stop(grace_seconds=0.0)
