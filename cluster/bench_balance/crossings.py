"""Layer crossings at a router's socket, as an attention worker sends them, at a steady pace.

Their sums are looked at for their shape alone: that tokens are right is the streams' to show.
"""

import asyncio
import random

import torch

from cluster.bench_balance.zipf import DriftingExperts
from model1.config import ModelConfig
from model1.moe import ExpertCall
from services.attention.experts import RoutedExperts

ROWS = 32  # of one crossing: a batch that decodes
MAX_OUT = 8


class CrossingLoad:
    """Build it inside the event loop."""

    def __init__(
        self,
        experts: RoutedExperts,
        model: ModelConfig,
        drawn: DriftingExperts,
        *,
        crossings_per_second: float,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.num_crossings = 0
        self.num_late = 0  # that were not sent, since the earlier ones were not answered
        self._experts = experts
        self._drawn = drawn
        self._pause_seconds = 1 / crossings_per_second
        self._num_layers = model.num_hidden_layers
        self._rng = random.Random(f"crossings {seed}")
        generator = torch.Generator().manual_seed(seed)
        self._rows = torch.randn(ROWS, model.hidden_size, generator=generator).to(dtype)
        self._out: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        clock = asyncio.get_running_loop().time
        due = clock()
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(max(0.0, due - clock()))
                due = max(due + self._pause_seconds, clock() - self._pause_seconds)
                if len(self._out) >= MAX_OUT:
                    self.num_late += 1
                    continue
                task = group.create_task(self._cross())
                self._out.add(task)
                task.add_done_callback(self._out.discard)

    async def _cross(self) -> None:
        expert_ids = torch.from_numpy(self._drawn.draw(ROWS))
        weights = torch.full(expert_ids.shape, 1 / expert_ids.shape[1])
        layer = self._rng.randrange(self._num_layers)
        sums = await (
            await self._experts.submit(ExpertCall(layer, self._rows, expert_ids, weights))
        )
        assert sums.shape == self._rows.shape
        self.num_crossings += 1
