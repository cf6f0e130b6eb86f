"""Which blocks of a prompt to load and which to compute: the cheapest way to its end, as ints.

A prompt is n blocks, with boundaries 0..n between them. To go on from a boundary a sequence must be
*live* there: the bodies of all blocks before it are in place, and so is the rest of its state.
Computing the block after a live boundary makes the next one live. Loading the bodies of [a, b) and
the tail at b makes b live, wherever a live a came from. So one damaged block costs the computing
from the last resume point before it to its own end; what follows it is still loaded::

    0        8        16   19      24           31
    |--------|--------|-x--|-------|------------|      x: the body of this block is missing
    |  load to 16     | compute    | load to 31 |

Knows no tiers, keys or tensors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class Load(NamedTuple):
    """Bodies of the blocks [start, end) and the tail at boundary `end`."""

    start: int
    end: int


class Compute(NamedTuple):
    """The blocks [start, end) from the live boundary `start`."""

    start: int
    end: int


Segment: TypeAlias = Load | Compute


class RestorePlan(NamedTuple):
    """Segments that follow on one another from 0 to n, and what they take."""

    segments: tuple[Segment, ...]
    seconds: float

    @property
    def loads(self) -> tuple[Load, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, Load))

    @property
    def num_loaded(self) -> int:
        """Blocks that need no computing."""
        return sum(load.end - load.start for load in self.loads)


def cheapest_plan(
    body_seconds: Sequence[float | None],
    tail_seconds: Sequence[float | None],
    compute_seconds: float,
) -> RestorePlan:
    """The plan of least time for n blocks; of equals the one that computes less.

    `body_seconds[i]`: loading the body of block i; None: nobody has it. `tail_seconds[i]`: loading
    the tail at boundary i + 1, the end of block i. `compute_seconds`: computing a block.
    """
    assert len(body_seconds) == len(tail_seconds)
    best = [0.0]  # [b] seconds until boundary b is live
    origin = [0]  # [b] the boundary before it on the best way; its own number if computed from b-1
    is_loaded = [False]
    # Within a run of bodies that exist, loading may begin at any boundary: at the one where the
    # time to be live there, less the loads before it, is least.
    begin, begin_value, loaded_seconds = 0, math.inf, 0.0
    for block, (body, tail) in enumerate(zip(body_seconds, tail_seconds, strict=True)):
        by_computing = best[block] + compute_seconds
        by_loading = math.inf
        if body is None:
            begin_value = math.inf
        else:
            if best[block] - loaded_seconds < begin_value:
                begin, begin_value = block, best[block] - loaded_seconds
            loaded_seconds += body
            if tail is not None:
                by_loading = begin_value + loaded_seconds + tail
        is_loaded.append(by_loading <= by_computing)
        best.append(min(by_loading, by_computing))
        origin.append(begin if is_loaded[-1] else block)
    return RestorePlan(tuple(_segments(origin, is_loaded)), best[-1])


def _segments(origin: Sequence[int], is_loaded: Sequence[bool]) -> list[Segment]:
    """Loads that follow on one another are one: rounding may begin a second one where a tail is
    free, and a sequence that has jumped must find something to compute before its next jump.
    """
    segments: list[Segment] = []
    end = len(origin) - 1
    while end:
        start = origin[end]
        while start and is_loaded[start] == is_loaded[end]:
            start = origin[start]
        segments.append(Load(start, end) if is_loaded[end] else Compute(start, end))
        end = start
    return segments[::-1]
