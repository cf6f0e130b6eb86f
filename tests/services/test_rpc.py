import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services import rpc


async def _health(address: str, service: str = "") -> int:
    async with rpc.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


async def test_a_free_port_is_picked_and_reported() -> None:
    async with await rpc.start_server([], "127.0.0.1:0") as server:
        assert not server.address.endswith(":0")
        assert await _health(server.address) == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_in_use_is_an_error_that_names_the_address() -> None:
    async with await rpc.start_server([], "127.0.0.1:0") as server:
        with pytest.raises(rpc.AddressUnavailable, match=server.address):
            await rpc.start_server([], server.address)


async def test_a_live_unix_socket_is_not_stolen(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/a.sock"
    async with await rpc.start_server([], address):
        with pytest.raises(rpc.AddressUnavailable, match=address):
            await rpc.start_server([], address)
        assert await _health(address) == health_pb2.HealthCheckResponse.SERVING


async def test_a_socket_file_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/a.sock")
    async with await rpc.start_server([], f"unix:{tmp_path}/a.sock") as server:
        assert await _health(server.address) == health_pb2.HealthCheckResponse.SERVING


async def test_one_server_listens_on_several_addresses(tmp_path: Path) -> None:
    extra = f"unix:{tmp_path}/a.sock"
    async with await rpc.start_server([], "127.0.0.1:0", [extra]) as server:
        for address in (server.address, extra):
            assert await _health(address) == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services() -> None:
    async with await rpc.start_server([], "127.0.0.1:0") as server:
        async with rpc.channel(server.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = await call.read()
            await call.done_writing()
        names = {service.name for service in listed.list_services_response.service}
        assert "grpc.health.v1.Health" in names


async def test_stopping_drains_within_the_grace_time_and_reports_not_serving() -> None:
    events: list[str] = []
    seen: list[int] = []
    draining, may_end = asyncio.Event(), asyncio.Event()

    async def drain() -> None:
        events.append("drain")
        seen.append(await _health(server.address, "model1.v1.Slow"))
        draining.set()
        await may_end.wait()
        events.append("drained")

    server = await rpc.start_server(
        [rpc.Service("model1.v1.Slow", lambda _server: None, drain)], "127.0.0.1:0"
    )
    stopping = asyncio.create_task(server.stop(grace_seconds=5.0))
    await draining.wait()
    assert seen == [health_pb2.HealthCheckResponse.NOT_SERVING]
    may_end.set()
    await stopping
    await server.stop()  # again changes nothing
    assert events == ["drain", "drained"]


async def test_a_drain_that_does_not_end_is_cut_off_at_the_grace_time() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    server = await rpc.start_server(
        [rpc.Service("model1.v1.Stuck", lambda _server: None, never)], "127.0.0.1:0"
    )
    async with asyncio.timeout(30):
        await server.stop(grace_seconds=0.05)
    with pytest.raises(grpc.aio.AioRpcError):
        await _health(server.address)


async def test_a_drain_that_fails_still_closes_the_server() -> None:
    async def failing() -> None:
        raise ZeroDivisionError

    server = await rpc.start_server(
        [rpc.Service("model1.v1.Failing", lambda _server: None, failing)], "127.0.0.1:0"
    )
    with pytest.raises(ZeroDivisionError):
        await server.stop(grace_seconds=0.05)
    with pytest.raises(grpc.aio.AioRpcError):
        await _health(server.address)
