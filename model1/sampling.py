"""From logits to a token. A draw is a pure function of (logits, parameters, position).

So a request that goes on elsewhere, or is computed again, draws the same tokens.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from model1.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; `temperature` 0 is greedy, `top_p` 1 and `top_k` 0 cut nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InvalidRequest(f"temperature must be between 0 and 100, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k must be 0 (off) or more, not {self.top_k}")


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """Choose from `logits [V]` float32 the token that stands at `position`.

    Ties go to the lowest token id.
    """
    if params.temperature == 0.0:
        return int((logits == logits.max()).nonzero()[0])
    order = logits.double().sort(descending=True, stable=True)
    # From the best downwards: then no temperature, however small, overflows.
    probs = torch.softmax((order.values - order.values[0]) / params.temperature, dim=-1)
    if params.top_k:
        probs[params.top_k :] = 0.0
    before = probs.cumsum(0) - probs
    probs[before >= params.top_p * probs.sum()] = 0.0  # the first is always kept
    cumulative = probs.cumsum(0)
    threshold = _uniform(params.seed, position) * float(cumulative[-1])
    chosen = int(torch.searchsorted(cumulative, threshold, right=True))
    return int(order.indices[min(chosen, int(probs.count_nonzero()) - 1)])


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
