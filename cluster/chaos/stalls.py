"""How long each stream stood still because of a fault. Plain values."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cluster.chaos.faults import Injected
from cluster.chaos.plan import Fault
from cluster.chaos.traffic import Exchange

# After a fault that it is still held responsible for; less if the next one comes first.
WINDOW_SECONDS = 30.0


class Stall(NamedTuple):
    """The longest time between two tokens of one request around a fault, less a normal one."""

    fault: Fault
    seconds: float


def normal_gap(exchanges: Iterable[Exchange]) -> float:
    """The median time between two messages with tokens, in seconds; 0 if there are none."""
    gaps = [end - begin for each in exchanges for begin, end in each.gaps]
    return statistics.median(gaps) if gaps else 0.0


def stalls(exchanges: Sequence[Exchange], faults: Sequence[Injected]) -> list[Stall]:
    """One for each request that had tokens before and after a fault, or in its window.

    `faults` in the order of their times.
    """
    normal = normal_gap(exchanges)
    found = []
    for index, fault in enumerate(faults):
        following = faults[index + 1].at if index + 1 < len(faults) else math.inf
        until = min(following, max(fault.recovered, fault.at + WINDOW_SECONDS))
        for exchange in exchanges:
            gaps = [end - begin for begin, end in exchange.gaps if end > fault.at and begin < until]
            if gaps:
                found.append(Stall(fault.fault, max(0.0, max(gaps) - normal)))
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted or unsorted values; the nearest one above."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]
