"""Which calls a server with tokens answers."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services import rpc
from services.tokens import RequireToken, TokenChannel, TokenFile, TokensUnusable, first_token

GOOD, OTHER, WRONG = "g" * 20, "o" * 20, "w" * 20


def _bytes(value: bytes) -> bytes:
    return value


async def _echo(requests: Any, _context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _echo_one(request: bytes, _context: Any) -> bytes:
    return request


def _register(server: grpc.aio.Server) -> None:
    handlers = {
        "One": grpc.unary_unary_rpc_method_handler(_echo_one),
        "Many": grpc.stream_stream_rpc_method_handler(_echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.Echo", handlers),))


@asynccontextmanager
async def _server(file: Path) -> AsyncIterator[str]:
    service = rpc.Service("t.Echo", _register)
    tokens = RequireToken(TokenFile(file))
    async with await rpc.start_server([service], "127.0.0.1:0", interceptors=[tokens]) as server:
        yield server.address


def _channel(address: str, token: str | None) -> grpc.aio.Channel:
    channel = rpc.channel(address)
    return channel if token is None else TokenChannel(channel, token)


async def _one(address: str, token: str | None) -> bytes:
    async with _channel(address, token) as channel:
        answer: bytes = await channel.unary_unary("/t.Echo/One", _bytes, _bytes)(b"x", timeout=5.0)
        return answer


async def _many(address: str, token: str | None) -> list[bytes]:
    async with _channel(address, token) as channel:
        ask = channel.stream_stream("/t.Echo/Many", _bytes, _bytes)
        return [message async for message in ask(iter([b"a", b"b"]), timeout=5.0)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"# of the operators\n{GOOD}\n\n{OTHER}\n")
    return file


@pytest.mark.parametrize("token", [GOOD, OTHER])
async def test_each_token_of_the_file_opens_every_kind_of_call(file: Path, token: str) -> None:
    async with _server(file) as address:
        assert await _one(address, token) == b"x"
        assert await _many(address, token) == [b"a", b"b"]


@pytest.mark.parametrize("token", [None, WRONG, "# of the operators", GOOD[:-1]])
async def test_any_other_call_is_unauthenticated(file: Path, token: str | None) -> None:
    async with _server(file) as address:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _one(address, token)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "token" in (refused.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _many(address, token)
        # gRPC's client says INTERNAL where a message of its own finds the stream refused already.
        assert refused.value.code() in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.INTERNAL,
        )


async def test_another_scheme_is_no_token(file: Path) -> None:
    async with _server(file) as address, rpc.channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            metadata = (("authorization", f"Basic {GOOD}"),)
            await channel.unary_unary("/t.Echo/One", _bytes, _bytes)(
                b"x", timeout=5.0, metadata=metadata
            )
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open_to_all(file: Path) -> None:
    async with _server(file) as address, rpc.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_tokens_come_and_go_with_the_file(file: Path) -> None:
    tokens = TokenFile(file, look_seconds=0.0)
    assert GOOD in tokens and WRONG not in tokens
    time.sleep(0.01)  # another time of modification
    file.write_text(WRONG)
    assert GOOD not in tokens and WRONG in tokens
    file.unlink()
    assert WRONG in tokens  # in the middle of being replaced


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no token"),
        (b"# none\n", "holds no token"),
        (b"short\n", "token 1 in .* has 5 characters: at least 16"),
        (f"{GOOD}\nshort\n".encode(), "token 2"),
        ("ü".encode() * 20, "token 1 in .* no header"),
        (b"\xff" * 20, "it is not text"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(TokensUnusable, match=words) as told:
        TokenFile(file)
    assert GOOD not in str(told.value)
    with pytest.raises(TokensUnusable, match="No such file"):
        TokenFile(tmp_path / "none")


def test_what_a_client_shows_is_the_first(file: Path) -> None:
    assert first_token(file) == GOOD
