"""What a layer crossing is measured against: bytes there and bytes back over one gRPC stream.

Run as `python -m cluster.bench_echo ADDRESS REPLY_BYTES`, it is the process at the other end, until
its stdin closes. Server and channel are opened as every role opens them; nothing is encoded.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from cluster.bench_child import started
from services import rpc

SERVICE = "model1.bench.Echo"
METHOD = "Echo"


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
async def echo(address: str, *, request_bytes: int, reply_bytes: int) -> AsyncIterator[Echo]:
    async with started("cluster.bench_echo", address, str(reply_bytes)) as child:
        await child.listen()  # so that the channel need not try twice
        async with rpc.channel(address) as channel:
            untyped: Any = channel  # the stubs demand serializers; bytes need none
            stream = untyped.stream_stream(f"/{SERVICE}/{METHOD}")()
            yield Echo(stream, request_bytes)
            await stream.done_writing()
            await stream.read()  # the end of the stream: a cut one would be logged by gRPC


async def _serve(address: str, reply_bytes: int) -> None:
    reply = b"\2" * reply_bytes

    async def answer(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield reply

    def register(server: grpc.aio.Server) -> None:
        method = grpc.stream_stream_rpc_method_handler(answer)
        handlers = grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})
        server.add_generic_rpc_handlers((handlers,))

    server = await rpc.start_server([rpc.Service(SERVICE, register)], address)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(
        grace_seconds=1.0
    )  # at once, now that nobody asks; 0 would cut, and be logged


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
