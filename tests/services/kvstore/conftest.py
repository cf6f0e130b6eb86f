"""Stores of this process and their clients, each checked when its test ends; a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from services.kvstore.client import KvClient
from services.kvstore.config import KvStoreConfig
from services.kvstore.disk import DiskConfig
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.server import KvStoreServer
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.blobs import client_config, eventually


async def idle(server: KvStoreServer) -> None:
    """Until nobody uses a blob: what workers release comes in a message of theirs."""

    async def is_idle() -> bool:
        return server.store.ram.num_uses == 0 and not len(server.store.loads)

    await eventually(is_idle)


class OpenStore(Protocol):
    def __call__(self, name: str = "store-0", **changes: Any) -> Awaitable[KvStoreServer]: ...


class Connect(Protocol):
    def __call__(self, server: KvStoreServer) -> Awaitable[KvClient]: ...


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[OpenStore]:
    """A store with RAM and a disk of a megabyte or so each, unless told otherwise."""
    async with AsyncExitStack() as opened:

        async def close(server: KvStoreServer) -> None:
            await server.stop(grace_seconds=5.0)
            server.store.check()
            assert server.store.ram.num_uses == 0

        async def open_one(name: str = "store-0", **changes: Any) -> KvStoreServer:
            settings: dict[str, Any] = {
                "arena_dir": tmp_path / name / "arena",
                "ram_bytes": 1 << 20,
                "disk": DiskConfig(tmp_path / name / "disk", 4 << 20, segment_bytes=1 << 20),
            }
            server = await KvStoreServer.open(KvStoreConfig(name=name, **{**settings, **changes}))
            opened.push_async_callback(close, server)
            return server

        yield open_one


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients: list[tuple[KvClient, KvStoreServer]] = []

    async def connect_to(server: KvStoreServer) -> KvClient:
        client = await KvClient.open(client_config(server.address))
        clients.append((client, server))
        async with asyncio.timeout(10):
            await client.wait_connected()
        return client

    yield connect_to
    for client, server in clients:
        await idle(server)
        await client.close()


@pytest.fixture(scope="session")
def shared_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"), max_bytes=64 << 20)
    yield server
    server.stop()


@pytest.fixture
def valkey(shared_valkey: EmbeddedValkey) -> EmbeddedValkey:
    """A real server with nothing in it."""
    config = RedisConfig(shared_valkey.url, shared_valkey.password, timeout_seconds=10.0)
    link = RedisLink(config)
    link.call("FLUSHALL", writes=True)
    link.close()
    return shared_valkey


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A real server that the test may ill-treat."""
    server = EmbeddedValkey(tmp_path / "valkey", max_bytes=64 << 20)
    yield server
    server.stop()
