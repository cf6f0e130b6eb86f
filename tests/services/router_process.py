"""A router in a process of its own, for tests that kill it: ADDRESS NUM_EXPERTS REPLICA..., each of
which holds every expert. Imports no torch, so that it is there soon."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from services import rpc
from services.router.router import Router
from services.router.routing import RoutingTable
from services.router.server import router_service

ROOT = Path(__file__).parents[2]


class RouterProcess:
    """Started, killed and started again at the same address."""

    def __init__(self, address: str, num_experts: int) -> None:
        self.address = address
        self._num_experts = num_experts
        self._process: subprocess.Popen[str] | None = None

    async def start(self, *replicas: str) -> None:
        """Its replicas may live in the caller's event loop, which goes on meanwhile."""
        await asyncio.to_thread(self._start, replicas)

    def _start(self, replicas: Sequence[str]) -> None:
        assert self._process is None
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.services.router_process"),
                *(self.address, str(self._num_experts), *replicas),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        assert self._process.stdout.readline().strip() == self.address

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout
            self._process.stdout.close()
            self._process = None


async def main() -> None:
    address, num_experts, *replicas = sys.argv[1:]
    router = Router("router-process")
    assert await router.update(RoutingTable.of(1, [replicas] * int(num_experts))) == ()
    server = await rpc.start_server([router_service(router)], address)
    print(server.address, flush=True)
    await server.wait_until_stopped()


if __name__ == "__main__":
    asyncio.run(main())
