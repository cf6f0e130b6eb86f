"""Owns the routed-expert weights of one replica and computes with them: a pure function of
(layer, rows), checked against what this replica holds now.

Knows no stream, no call id and no router. Keeps counters, and nothing else that could differ
between two replicas of the same experts.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model1.moe import ExpertBank
from services import errors
from services.histogram import Histogram
from services.wire import BFLOAT16_WORD, FLOAT32_WORD, ExpertRows, Words, first_outside

_WORD_OF: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: BFLOAT16_WORD,
    torch.float32: FLOAT32_WORD,
}


@dataclass(slots=True)
class ReplicaCounters:
    """Since the start. `pairs` are (row, expert) pairs, the unit of work."""

    calls: int = 0
    rows: int = 0
    pairs: int = 0
    failed_calls: int = 0
    late_calls: int = 0  # past their deadline before their turn, and therefore not computed
    busy_seconds: float = 0.0  # with a call, from its bytes to those of its answer
    compute_seconds: Histogram = field(default_factory=Histogram)  # of a call, within that


class ExpertReplica:
    def __init__(self, name: str, bank: ExpertBank) -> None:
        self.name = name
        self.counters = ReplicaCounters()
        self._bank = bank
        self._dtype, self._device = bank.dtype, bank.device
        self._word = _WORD_OF[bank.dtype]
        self._held = self._held_by_bank()

    @property
    def expert_ids(self) -> tuple[int, ...]:
        return tuple(sorted(self._bank.expert_ids))

    def take(self, bank: ExpertBank) -> None:
        """Hold these as well. Both banks are packed, and nothing is computed meanwhile."""
        self._bank.take(bank)
        self._held = self._held_by_bank()

    def drop(self, expert_ids: Collection[int]) -> None:
        """Hold these no longer; nothing is computed meanwhile."""
        self._bank.drop(expert_ids)
        self._held = self._held_by_bank()

    def compute(self, call: ExpertRows) -> Words:
        """One row a pair [P, D], in the call's order. Raises ModelMismatch and ExpertNotHeld."""
        self._check(call)
        if not len(call.row_index):
            return call.rows[:0]
        started = time.perf_counter()
        with torch.inference_mode():
            pair_rows = self._bank(
                call.layer,
                self._to_torch(call.rows).view(self._dtype),
                self._to_torch(call.row_index).long(),
                self._to_torch(call.expert_ids).long(),
                self._to_torch(call.weights),
            )
        answer: Words = pair_rows.cpu().contiguous().view(_storage_of(self._dtype)).numpy()
        self.counters.compute_seconds.observe(time.perf_counter() - started)
        self.counters.calls += 1
        self.counters.rows += len(call.rows)
        self.counters.pairs += len(call.row_index)
        return answer

    def warm_up(self) -> None:
        """A row through every expert, so that the first caller does not wait for weights that
        nobody touched before. Counts as nothing."""
        num_experts = len(self.expert_ids)
        for layer in range(self._bank.config.num_hidden_layers):
            self.compute(
                ExpertRows(
                    layer=layer,
                    rows=np.zeros((1, self._bank.config.hidden_size), dtype=self._word),
                    row_index=np.zeros(num_experts, dtype=np.int32),
                    expert_ids=np.array(self.expert_ids, dtype=np.int32),
                    weights=np.ones(num_experts, dtype=np.float32),
                )
            )
        self.counters = ReplicaCounters()

    def _check(self, call: ExpertRows) -> None:
        config = self._bank.config
        if not 0 <= call.layer < config.num_hidden_layers:
            raise errors.ModelMismatch(
                f"layer {call.layer}: the model of replica {self.name} has "
                f"{config.num_hidden_layers} layers"
            )
        if call.rows.shape[1] != config.hidden_size:
            raise errors.ModelMismatch(
                f"rows of hidden size {call.rows.shape[1]}: replica {self.name} has "
                f"{config.hidden_size}"
            )
        if call.rows.dtype != self._word:
            raise errors.ModelMismatch(
                f"rows of {8 * call.rows.dtype.itemsize} bits: replica {self.name} computes in "
                f"{self._dtype}"
            )
        ids = call.expert_ids
        if (stranger := first_outside(ids, len(self._held))) is not None:
            raise errors.ModelMismatch(
                f"expert {stranger}: the model of replica {self.name} has {len(self._held)} experts"
            )
        if not self._held[ids].all():
            missing = int(ids[self._held[ids].argmin()])
            raise errors.ExpertNotHeld(f"expert {missing} is not held by replica {self.name}")

    def _held_by_bank(self) -> NDArray[np.bool_]:
        held = np.zeros(self._bank.config.n_routed_experts, dtype=np.bool_)
        held[list(self._bank.expert_ids)] = True
        return held

    def _to_torch(self, array: NDArray[Any]) -> Tensor:
        # A copy, since what arrived is read-only memory, which torch does not know.
        return torch.from_numpy(array.copy()).to(self._device)


def _storage_of(dtype: torch.dtype) -> torch.dtype:
    """numpy has no bfloat16: its words travel as uint16."""
    return torch.uint16 if dtype == torch.bfloat16 else dtype
