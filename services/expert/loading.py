"""From a checkpoint directory to a replica that holds some of its experts, and to others later.

Takes the dtype by name, so that whoever starts replicas needs no torch.
"""

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from model1.checkpoint import ExpertReader
from model1.modules import packed
from model1.moe import ExpertBank
from services.expert.replica import ExpertReplica

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HeldExperts:
    """A replica, and the checkpoint that it takes its experts from. `replica` computes with them in
    the event loop, where they are taken and dropped between two calls."""

    def __init__(
        self, directory: Path, *, name: str, expert_ids: Sequence[int], dtype: str, device: str
    ) -> None:
        """Reads the tensors of these experts and no others, and computes with each of them. Raises
        a `ModelError`."""
        self._name = name
        self._reader = ExpertReader(directory, _DTYPES[dtype], device)
        self._one_at_a_time = asyncio.Lock()
        self.replica = ExpertReplica(name, self._read(expert_ids))

    async def hold(self, expert_ids: Collection[int]) -> None:
        """Exactly these from now on. Those that are new are read in a thread, and have computed
        once when the first caller comes. Raises a `ModelError`, and then holds what it held."""
        async with self._one_at_a_time:
            held = set(self.replica.expert_ids)
            if new := sorted(set(expert_ids) - held):
                self.replica.take(await asyncio.to_thread(self._read, new))
            if old := held.difference(expert_ids):
                self.replica.drop(old)

    def _read(self, expert_ids: Sequence[int]) -> ExpertBank:
        bank = packed(self._reader.read(expert_ids))
        ExpertReplica(self._name, bank).warm_up()
        return bank
