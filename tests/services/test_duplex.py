"""The client's end of a stream against peers that misbehave."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from services import duplex, rpc
from services.duplex import CLOCK_KEY, Duplex

Handler = Callable[[AsyncIterator[bytes], Any], Any]


@asynccontextmanager
async def peer(address: str, handler: Handler) -> AsyncIterator[None]:
    methods = {"Talk": grpc.stream_stream_rpc_method_handler(handler)}

    def register(server: grpc.aio.Server) -> None:
        generic = grpc.method_handlers_generic_handler("test.Peer", methods)
        server.add_generic_rpc_handlers((generic,))

    server = await rpc.start_server([rpc.Service("test.Peer", register)], address)
    try:
        yield
    finally:
        await server.stop(grace_seconds=0.0)


@asynccontextmanager
async def connected_to(
    address: str,
    *,
    receive: Callable[[bytes], None] = lambda _message: None,
    opened: Callable[[Any], None] = lambda _metadata: None,
) -> AsyncIterator[tuple[Duplex[bytes, bytes], list[str]]]:
    breaks: list[str] = []

    def open_stream(channel: Any) -> Any:
        return channel.stream_stream("/test.Peer/Talk")(wait_for_ready=True)

    link = Duplex[bytes, bytes](
        address, open_stream, opened=opened, receive=receive, broken=breaks.append
    )
    try:
        async with asyncio.timeout(30):
            yield link, breaks
    finally:
        await link.close()


async def echo(requests: AsyncIterator[bytes], context: Any) -> None:
    await context.send_initial_metadata(((CLOCK_KEY, "0"),))
    async for message in requests:
        await context.write(message)


async def test_a_message_that_cannot_be_taken_breaks_the_stream_and_a_new_one_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    received: asyncio.Queue[bytes] = asyncio.Queue()

    def receive(message: bytes) -> None:
        if message == b"bad":
            raise KeyError("bad")
        received.put_nowait(message)

    address = f"unix:{tmp_path}/a.sock"
    async with peer(address, echo), connected_to(address, receive=receive) as (link, breaks):
        await link.wait_connected()
        with caplog.at_level(logging.ERROR):
            link.send(b"bad")
            while not breaks:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert breaks == ["a message could not be taken: KeyError: 'bad'"]
        await link.wait_connected()
        link.send(b"good")
        assert await received.get() == b"good"


async def test_a_stranger_at_the_address_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def opened(_metadata: Any) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise KeyError(CLOCK_KEY)

    address = f"unix:{tmp_path}/a.sock"
    with caplog.at_level(logging.ERROR):
        async with peer(address, echo), connected_to(address, opened=opened) as (link, breaks):
            await link.wait_connected()
            assert (tries, breaks) == (2, [])


async def test_a_peer_that_reads_nothing_counts_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplex, "MAX_UNSENT_MESSAGES", 8)

    async def silent(_requests: AsyncIterator[bytes], context: Any) -> None:
        await context.send_initial_metadata(((CLOCK_KEY, "0"),))
        await asyncio.Event().wait()

    address = f"unix:{tmp_path}/a.sock"
    async with peer(address, silent), connected_to(address) as (link, _):
        await link.wait_connected()
        num_sent = 0
        while link.connected and num_sent < 1000:
            link.send(bytes(1024 * 1024))
            num_sent += 1
            await asyncio.sleep(0)
        assert 8 <= num_sent < 1000
