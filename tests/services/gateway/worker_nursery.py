"""Attention workers in processes of their own, for tests that kill and freeze them.

Run as a program it is a process that has loaded everything and forks a worker for each line on its
stdin: NAME in, PID and ADDRESS out. It ends with its stdin, and ends its workers before.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from services.attention.scheduler import SchedulerLimits
from services.gateway.worker import WorkerAddress
from tests.services import tiny_model
from tests.services.gateway.deployed import open_worker

# Room for all streams of a test at one worker.
LIMITS = SchedulerLimits(max_batch_tokens=64, max_sequences=8, max_waiting=8)
# What a worker does with its loop while it computes one long step: nothing else.
LONG_STEP_SECONDS = 2.0
LONG_STEP = signal.SIGUSR1


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    row: WorkerAddress
    pid: int

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)


class Nursery:
    """Starts workers."""

    def __init__(self, process: "asyncio.subprocess.Process") -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    async def worker(self, name: str) -> WorkerProcess:
        self._stdin.write(f"{name}\n".encode())
        pid, address = (await self._stdout.readline()).decode().split()
        return WorkerProcess(WorkerAddress(name, address), int(pid))


@asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def _fork(name: str) -> int:
    if pid := os.fork():
        return pid
    signal.signal(LONG_STEP, lambda *_: time.sleep(LONG_STEP_SECONDS))
    asyncio.run(_serve(name))
    os._exit(0)


async def _serve(name: str) -> None:
    worker = await open_worker(name, tiny_model.pool(), store_address="", limits=LIMITS)
    print(os.getpid(), worker.address, flush=True)
    await asyncio.Event().wait()


def _main() -> None:
    torch.set_num_threads(1)
    tiny_model.model()
    # Nobody waits for those that are killed: as zombies they keep their pids from anybody else.
    workers = [_fork(line.strip()) for line in sys.stdin]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _main()
