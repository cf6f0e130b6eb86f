"""A KV store in a process of its own that also does what only its inside can: an operator's hands.

Reads one JSON command a line from stdin and answers each with one line. The words:

    spans  keys            [offset, length] of each blob in the arena, or null
    arena                  path of the arena's file
    bring  keys            into RAM, from wherever they are; how many are there
    drop   tier keys       forget these blobs in that tier; how many it had
    peers  addresses       of the other nodes' stores, from now on
    flush                  wait until disk and Redis have what they are to have
    check                  assert that nothing leaked, and that nothing is under way
    rss                    resident bytes of the process, shared memory not counted
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pickle
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.kvstore.admin import Admin
from services.kvstore.config import KvStoreConfig
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier

_MAX_LINE_BYTES = 64 << 20
_START_TIMEOUT_SECONDS = 60
_SETTLE_SECONDS = 5.0
_COMMAND_TIMEOUT_SECONDS = 120


class _Hands:
    """What the commands do, inside the store's process."""

    def __init__(self, server: KvStoreServer) -> None:
        self._server = server
        self._store = server.store
        self._admin = Admin(server.store, server.leases)

    def spans(self, keys: list[str]) -> list[tuple[int, int] | None]:
        return [self._span(bytes.fromhex(key)) for key in keys]

    def arena(self) -> str:
        return str(self._store.ram.arena.path)

    async def bring(self, keys: list[str]) -> int:
        return await self._store.bring(list(map(bytes.fromhex, keys)), _COMMAND_TIMEOUT_SECONDS)

    async def drop(self, tier: str, keys: list[str]) -> int:
        return await self._admin.drop(Tier[tier], list(map(bytes.fromhex, keys)))

    async def peers(self, addresses: list[str]) -> None:
        await self._server.set_peers(addresses)

    async def flush(self) -> None:
        await self._store.flush()

    async def check(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                while self._store.ram.num_uses:  # noqa: ASYNC110 releases are on their way
                    await asyncio.sleep(0.01)
        self._server.check()
        assert self._store.ram.num_uses == 0, f"{self._store.ram.num_uses} uses of blobs"

    def rss(self) -> int:
        return resident_bytes()

    def _span(self, key: bytes) -> tuple[int, int] | None:
        resident = self._store.ram.hold(key)
        if resident is None:
            return None
        self._store.ram.let_go(resident)
        return resident.span.offset, resident.span.length


def resident_bytes() -> int:
    """Of this process, shared memory not counted."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


async def main() -> None:
    logging.basicConfig(level=logging.ERROR)  # damage by the thousand is what we came for
    config: KvStoreConfig = pickle.loads(bytes.fromhex(sys.argv[1]))
    server = await KvStoreServer.open(config)
    hands = _Hands(server)
    print(json.dumps(server.address), flush=True)
    lines = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    while line := await lines.readline():
        command = json.loads(line)
        try:
            answer = getattr(hands, command.pop("do"))(**command)
            if asyncio.iscoroutine(answer):
                answer = await answer
            print(json.dumps({"answer": answer}), flush=True)
        except Exception:
            print(json.dumps({"error": traceback.format_exc()}), flush=True)
    await server.stop(grace_seconds=5.0)


class StoreProcess:
    """The parent's end. Commands go one at a time."""

    def __init__(
        self, config: KvStoreConfig, process: asyncio.subprocess.Process, address: str
    ) -> None:
        self.config = config
        self.address = address
        self.process = process
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, config: KvStoreConfig) -> StoreProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.soak.store_process",
            pickle.dumps(config).hex(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
        )
        assert process.stdout is not None
        async with asyncio.timeout(_START_TIMEOUT_SECONDS):
            line = await process.stdout.readline()
        assert line, "the store did not start"
        return cls(config, process, json.loads(line))

    async def do(self, command: str, **arguments: Any) -> Any:
        """What the command answers; raises AssertionError with its traceback if it failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        async with self._turn, asyncio.timeout(_COMMAND_TIMEOUT_SECONDS):
            line = json.dumps({"do": command, **arguments}).encode() + b"\n"
            self.process.stdin.write(line)
            await self.process.stdin.drain()
            answer = json.loads(await self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    async def bring(self, keys: Sequence[bytes]) -> int:
        return int(await self.do("bring", keys=[key.hex() for key in keys]))

    async def drop(self, tier: Tier, keys: Sequence[bytes]) -> int:
        return int(await self.do("drop", tier=tier.name, keys=[key.hex() for key in keys]))

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """As on SIGTERM: orderly."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        async with asyncio.timeout(_COMMAND_TIMEOUT_SECONDS):
            return await self.process.wait()


if __name__ == "__main__":
    asyncio.run(main())
