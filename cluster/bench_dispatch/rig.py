"""The processes that the parts of the benchmark share: a router and replicas, each its own, as a
deployment has them, and the worker's end of crossings in this one.
"""

import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bench_child import Child, started
from model1.checkpoint import load_config
from model1.config import ModelConfig

NUM_EMULATED = 4
NUM_REAL = 2

_PACKAGE = "cluster.bench_dispatch"


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """Of each role since its process started; of the replicas together."""

    worker: float
    router: float
    experts: float

    def since(self, earlier: "CpuSeconds", *, steps: int) -> "CpuSeconds":
        """Of each of so many steps in between."""
        return CpuSeconds(
            (self.worker - earlier.worker) / steps,
            (self.router - earlier.router) / steps,
            (self.experts - earlier.experts) / steps,
        )

    @property
    def total(self) -> float:
        return self.worker + self.router + self.experts


class Rig:
    """Emulated replicas hold every expert, the real ones a half each."""

    def __init__(
        self,
        directory: Path,
        router_address: str,
        router: Child,
        emulated: Sequence[tuple[Child, str]],
        real: Sequence[tuple[Child, str]],
    ) -> None:
        self.directory = directory
        self.router_address = router_address
        self.config: ModelConfig = load_config(directory)
        self._router = router
        self._emulated = emulated
        self._real = real

    @property
    def emulated_addresses(self) -> list[str]:
        return [address for _, address in self._emulated]

    async def use_real(self) -> None:
        """Two groups of experts, a replica each, that compute."""
        await self._use(self.halved([address for _, address in self._real]))

    async def use_emulated(self, replicas_of_expert: Sequence[Sequence[str]], speed: float) -> None:
        """`speed` in bytes of weights a second; inf: they take no time."""
        for child, _ in self._emulated:
            await child.ask(repr(speed))
        await self._use(replicas_of_expert)

    def halved(self, addresses: Sequence[str]) -> list[list[str]]:
        """Two groups: the first half of the experts on the first replica, the rest on the next."""
        num_experts = self.config.n_routed_experts
        return [[addresses[2 * expert // num_experts]] for expert in range(num_experts)]

    def copied(self, num_replicas: int) -> list[list[str]]:
        """One group on so many replicas."""
        return [self.emulated_addresses[:num_replicas]] * self.config.n_routed_experts

    async def cpu_seconds(self) -> CpuSeconds:
        """Of the real replicas; of emulated ones it would say nothing."""
        experts = [float(await child.ask("cpu")) for child, _ in self._real]
        return CpuSeconds(time.process_time(), float(await self._router.ask("[]")), sum(experts))

    async def _use(self, replicas_of_expert: Sequence[Sequence[str]]) -> None:
        await self._router.ask(json.dumps(replicas_of_expert))


@asynccontextmanager
async def opened_rig(directory: Path, folder: Path) -> AsyncIterator[Rig]:
    """Loads; the first table is that of the real replicas."""
    num_experts = load_config(directory).n_routed_experts
    middle = math.ceil(num_experts / NUM_REAL)
    async with AsyncExitStack() as stack:

        async def start(kind: str, first: int, end: int) -> Child:
            arguments = (kind, str(directory), str(first), str(end))
            module = f"{_PACKAGE}.replica_process"
            return await stack.enter_async_context(started(module, *arguments))

        halves = [await start("real", 0, middle), await start("real", middle, num_experts)]
        copies = [await start("emulated", 0, num_experts) for _ in range(NUM_EMULATED)]
        # All load at the same time.
        real = [(child, (await child.listen()).strip()) for child in halves]
        emulated = [(child, (await child.listen()).strip()) for child in copies]
        address = f"unix:{folder}/router.sock"
        router = await stack.enter_async_context(started(f"{_PACKAGE}.router_process", address))
        await router.listen()
        rig = Rig(directory, address, router, emulated, real)
        await rig.use_real()
        yield rig


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


async def breathe() -> None:
    """Let the processes finish what they do between two measurements."""
    await asyncio.sleep(0.05)
