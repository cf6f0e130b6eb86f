"""A TCP proxy that can be slow or shut: a Redis far away, or behind a broken link."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Proxy:
    """Between clients and a server on this machine. Change `delay_seconds` at any time."""

    def __init__(self, server: asyncio.Server, target_port: int) -> None:
        self.delay_seconds = 0.0
        self.port: int = server.sockets[0].getsockname()[1]
        self._server = server
        self._target_port = target_port
        self._pipes: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, target_port: int) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(lambda *pair: proxy.accept(*pair), "127.0.0.1", 0)
        proxy = cls(server, target_port)
        try:
            yield proxy
        finally:
            server.close()
            proxy.cut()

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        for pipe in list(self._pipes):
            pipe.cancel()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = asyncio.create_task(self._serve(reader, writer))
        self._pipes.add(pipe)
        pipe.add_done_callback(self._pipes.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            with contextlib.closing(back):
                _, pending = await asyncio.wait(
                    [
                        asyncio.create_task(self._pump(reader, back, delayed=True)),
                        asyncio.create_task(self._pump(there, writer, delayed=False)),
                    ],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for pump in pending:
                    pump.cancel()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if delayed and self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                writer.write(data)
                await writer.drain()
