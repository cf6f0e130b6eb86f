"""The restore planner against every possible plan of a short prompt."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.attention.restore_plan import Compute, Load, RestorePlan, cheapest_plan

FREE = 0.0


def _plan(bodies: str, tails: str, compute_seconds: float = 1.0) -> RestorePlan:
    """One character a block: `.` is absent, `x` costs nothing."""
    return cheapest_plan(
        [FREE if body == "x" else None for body in bodies],
        [FREE if tail == "x" else None for tail in tails],
        compute_seconds,
    )


@pytest.mark.parametrize(
    ("bodies", "tails", "segments"),
    [
        ("", "", ()),
        ("...", "...", (Compute(0, 3),)),
        ("xxx", "..x", (Load(0, 3),)),
        ("xxx", "...", (Compute(0, 3),)),  # bodies without a tail are of no use
        ("...", "xxx", (Compute(0, 3),)),  # nor the other way round
        ("xxxx", ".x..", (Load(0, 2), Compute(2, 4))),
        ("xxxx", ".x.x", (Load(0, 4),)),  # one jump, not two
        # An island: block 3 is damaged, 2 is the last resume point before it, 6 the last of all.
        ("xxx.xx", ".x.x.x", (Load(0, 2), Compute(2, 4), Load(4, 6))),
        ("xxx.xx.", ".x.x.x.", (Load(0, 2), Compute(2, 4), Load(4, 6), Compute(6, 7))),
        ("x.x.xx", "x.x..x", (Load(0, 1), Compute(1, 2), Load(2, 3), Compute(3, 4), Load(4, 6))),
        (".xx", "..x", (Compute(0, 1), Load(1, 3))),
    ],
)
def test_what_is_there_is_loaded_up_to_the_last_resume_point(
    bodies: str, tails: str, segments: tuple[Load | Compute, ...]
) -> None:
    assert _plan(bodies, tails).segments == segments


def test_what_is_faster_to_compute_is_not_loaded() -> None:
    slow, fast = [3.0] * 4, [0.5] * 4
    assert cheapest_plan(slow, [0.1] * 4, 1.0).segments == (Compute(0, 4),)
    assert cheapest_plan(fast, [None, None, None, 1.0], 1.0).segments == (Load(0, 4),)
    assert cheapest_plan(fast, [None, None, None, 2.5], 1.0).segments == (Compute(0, 4),)
    mixed = cheapest_plan([0.5, 0.5, 3.0, 0.5], [0.1, 0.1, 0.1, 0.1], 1.0)
    assert mixed.segments == (Load(0, 2), Compute(2, 3), Load(3, 4))
    assert mixed.seconds == pytest.approx(0.5 * 2 + 0.1 + 1 + 0.5 + 0.1)


def test_a_load_that_passes_a_free_tail_is_one_load_however_sums_are_rounded() -> None:
    plan = cheapest_plan([None, 0.3, 0.3], [None, FREE, FREE], 2.0)
    assert 2.0 + 0.3 - 0.3 < 2.0  # so loading seems to begin better at block 2
    assert plan.segments == (Compute(0, 1), Load(1, 3))


SECONDS = st.one_of(st.none(), st.integers(0, 8).map(lambda eighths: eighths / 8))


@given(
    blocks=st.lists(st.tuples(SECONDS, SECONDS), max_size=9),
    compute_seconds=st.integers(0, 16).map(lambda eighths: eighths / 8),
)
def test_no_plan_is_cheaper_and_the_plan_can_be_followed(
    blocks: list[tuple[float | None, float | None]], compute_seconds: float
) -> None:
    bodies = [body for body, _ in blocks]
    tails = [tail for _, tail in blocks]

    @cache
    def least_seconds(end: int) -> float:
        """Of all ways to be live at `end`; eighths are exact, so they compare exactly."""
        if end == 0:
            return 0.0
        ways = [least_seconds(end - 1) + compute_seconds]
        tail = tails[end - 1]
        for start in range(end):
            loads = [body for body in bodies[start:end] if body is not None]
            if tail is not None and len(loads) == end - start:
                ways.append(least_seconds(start) + sum(loads) + tail)
        return min(ways)

    plan = cheapest_plan(bodies, tails, compute_seconds)
    assert plan.seconds == least_seconds(len(blocks))
    position, seconds = 0, 0.0
    for segment in plan.segments:
        assert segment.start == position < segment.end
        position = segment.end
        if isinstance(segment, Compute):
            seconds += compute_seconds * (segment.end - segment.start)
            continue
        tail = tails[segment.end - 1]
        assert tail is not None
        seconds += tail
        for body in bodies[segment.start : segment.end]:
            assert body is not None
            seconds += body
    assert position == len(blocks)
    assert seconds == plan.seconds
