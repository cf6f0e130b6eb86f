"""A KV store in a process of its own, for tests that kill it: a pickled KvStoreConfig in hex."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator

from services.kvstore.config import KvStoreConfig
from services.kvstore.server import KvStoreServer


async def main() -> None:
    config = pickle.loads(bytes.fromhex(sys.argv[1]))
    server = await KvStoreServer.open(config)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(server.address, flush=True)
    await stopping.wait()
    await server.stop(grace_seconds=5.0)


class StoreProcess:
    """A running store; `address` is where it listens."""

    def __init__(self, config: KvStoreConfig) -> None:
        words = [sys.executable, "-m", "tests.services.kvstore.store_process"]
        self._process = subprocess.Popen(
            [*words, pickle.dumps(config).hex()], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the store did not start"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        self._process.terminate()
        return self._process.wait(timeout=10)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def running_store(config: KvStoreConfig) -> Iterator[StoreProcess]:
    store = StoreProcess(config)
    try:
        yield store
    finally:
        store.close()


if __name__ == "__main__":
    asyncio.run(main())
