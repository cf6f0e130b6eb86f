"""What a layer crossing is compared with: the same bytes over the same hops, and nothing else.

Run as `python -m cluster.bench_echo ADDRESS REPLY_BYTES [LEAF REQUEST_BYTES]...`,
it is a process that answers each message on a stream: at once, or after it has sent so many bytes
to each leaf and has their answers. Servers and channels are opened as every role opens them;
nothing is encoded, added, checked or looked at.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import grpc
import grpc.aio

from cluster.bench_child import started
from services import rpc

SERVICE = "model1.bench.Echo"
METHOD = "Echo"


class HopBytes(NamedTuple):
    """Of the messages of a crossing."""

    request: int  # worker -> router
    reply: int  # router -> worker
    parts: tuple[int, ...] = ()  # router -> each replica; none: the router answers at once
    part_replies: tuple[int, ...] = ()


class Echo:
    def __init__(self, stream: Any, request_bytes: int) -> None:
        self._stream = stream
        self._request = b"\1" * request_bytes

    async def round_trips(self, count: int) -> list[float]:
        """Seconds of each, one after the other."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            await self._stream.write(self._request)
            await self._stream.read()
            seconds.append(time.perf_counter() - start)
        return seconds


@asynccontextmanager
async def echo(address: str, hops: HopBytes) -> AsyncIterator[Echo]:
    """A relay at `address` and one leaf for each part, on TCP as replicas are."""
    module = "cluster.bench_echo"
    async with AsyncExitStack() as stack:
        leaves: list[str] = []
        for part, reply in zip(hops.parts, hops.part_replies, strict=True):
            leaf = await stack.enter_async_context(started(module, "127.0.0.1:0", str(reply)))
            leaves += [(await leaf.listen()).strip(), str(part)]
        relay = await stack.enter_async_context(started(module, address, str(hops.reply), *leaves))
        await relay.listen()
        stream = await stack.enter_async_context(_stream(address))
        yield Echo(stream, hops.request)


@asynccontextmanager
async def _stream(address: str) -> AsyncIterator[Any]:
    async with rpc.channel(address) as channel:
        untyped: Any = channel  # the stubs demand serializers; bytes need none
        stream = untyped.stream_stream(f"/{SERVICE}/{METHOD}")()
        yield stream
        await stream.done_writing()
        await stream.read()  # the end of the stream: a cut one would be logged by gRPC


async def _serve(address: str, reply_bytes: int, leaves: Sequence[tuple[str, int]]) -> None:
    reply = b"\2" * reply_bytes
    async with AsyncExitStack() as stack:
        streams = [
            (await stack.enter_async_context(_stream(leaf)), b"\3" * num_bytes)
            for leaf, num_bytes in leaves
        ]

        async def answer(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
            async for _ in requests:
                for stream, part in streams:
                    await stream.write(part)
                for stream, _part in streams:
                    await stream.read()
                yield reply

        def register(server: grpc.aio.Server) -> None:
            method = grpc.stream_stream_rpc_method_handler(answer)
            handlers = grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})
            server.add_generic_rpc_handlers((handlers,))

        server = await rpc.start_server([rpc.Service(SERVICE, register)], address)
        print(server.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        # At once, now that nobody asks; 0 would cut, and be logged.
        await server.stop(grace_seconds=1.0)


if __name__ == "__main__":
    _, _address, _reply, *_leaves = sys.argv
    _sizes = [int(size) for size in _leaves[1::2]]
    asyncio.run(_serve(_address, int(_reply), list(zip(_leaves[::2], _sizes, strict=True))))
