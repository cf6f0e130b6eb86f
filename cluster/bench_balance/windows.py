"""How evenly replicas were loaded over time, from what routers counted. Plain values."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cluster.expert_placement import balance

# Of the load that one balance is of: in less, chance alone is a good part of an imbalance.
WINDOW_SECONDS = 5.0
# A balance that is kept for as long is no accident.
KEPT_SECONDS = 10.0


class Counted(NamedTuple):
    """Pairs sent to each replica until a moment on `time.monotonic`, by address."""

    at: float
    pairs: Mapping[str, int]


class Balanced(NamedTuple):
    """The mean over the largest load of the replicas in the window that ended `at`."""

    at: float
    balance: float


def balances(counted: Sequence[Counted]) -> list[Balanced]:
    """One for each reading that has one from a window before. A replica that is known to one of
    both alone has just come or gone, and is left out."""
    found = []
    first = 0
    for reading in counted:
        while counted[first + 1].at <= reading.at - WINDOW_SECONDS:
            first += 1
        then = counted[first]
        if then.at > reading.at - WINDOW_SECONDS:
            continue
        both = sorted(reading.pairs.keys() & then.pairs.keys())
        loads = np.array([reading.pairs[each] - then.pairs[each] for each in both], dtype=float)
        found.append(Balanced(reading.at, balance(loads)))
    return found


def seconds_until_kept(since: Sequence[Balanced], begun: float, target: float) -> float | None:
    """From `begun` until the balance was reached and kept; None: it was not."""
    reached: float | None = None
    for each in since:
        if each.balance < target:
            reached = None
        elif reached is None:
            reached = each.at
        if reached is not None and each.at - reached >= KEPT_SECONDS:
            return reached - begun
    return None
