"""Layer crossings whose experts follow Zipf's law, the hot ones changing: which, and how skewed.

Plain arrays. A row's experts are all different, drawn one after the other among those that it does
not have yet, so that none gets more than one pair a row.
"""

import numpy as np
from numpy.typing import NDArray


class DriftingExperts:
    def __init__(self, num_experts: int, topk: int, exponent: float, *, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._topk = topk
        weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
        self._log_weights = np.log(weights / weights.sum())  # by rank
        self._expert_of_rank = self._rng.permutation(num_experts).astype(np.int32)

    @property
    def num_hot(self) -> int:
        """That change places in a drift: those of the hottest quarter."""
        return max(1, len(self._expert_of_rank) // 4)

    def drift(self) -> None:
        """The hottest change places with others, drawn at random."""
        ranks, hot = self._expert_of_rank, self.num_hot
        others = hot + self._rng.permutation(len(ranks) - hot)[:hot]
        ranks[:hot], ranks[others] = ranks[others], ranks[:hot].copy()

    def draw(self, num_rows: int) -> NDArray[np.int32]:
        """Expert ids [num_rows, topk], ascending in each row."""
        # The largest of logarithms with Gumbel noise: drawn without putting back.
        noisy = self._log_weights + self._rng.gumbel(size=(num_rows, len(self._log_weights)))
        ranks = np.argpartition(-noisy, self._topk - 1, axis=1)[:, : self._topk]
        return np.sort(self._expert_of_rank[ranks], axis=1)

    def share_of_rows(self) -> NDArray[np.float64]:
        """By which each expert is chosen [num_experts], measured on many rows; adds up to topk."""
        num_rows = 20_000
        counts = np.bincount(self.draw(num_rows).ravel(), minlength=len(self._log_weights))
        return counts / num_rows
