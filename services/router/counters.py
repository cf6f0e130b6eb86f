"""What a router counts since its start. Each field is told in Stats as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.router.pairs import count_experts
from services.wire import LayerRows


@dataclass(slots=True)
class RouterCounters:
    """`rows` are rows of crossings, before they are split into pairs."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    resent_parts: int = 0
    hedged_parts: int = 0
    hedges_won: int = 0
    probe_parts: int = 0
    # [num_experts] pairs that workers asked for, copies not included; empty before the first one.
    expert_pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def load(self, call: LayerRows, num_experts: int) -> None:
        if len(self.expert_pairs) != num_experts:  # the first one: the first table is in use
            self.expert_pairs = np.zeros(num_experts, dtype=np.int64)
        count_experts(call.expert_ids, self.expert_pairs)
