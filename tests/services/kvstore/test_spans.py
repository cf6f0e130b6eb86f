import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.kvstore.spans import GRANULE_BYTES, Span, SpanAllocator, StaleSpan


def test_spans_are_aligned_and_rounded_up_to_whole_granules() -> None:
    spans = SpanAllocator(64, 1088)
    first, second = spans.allocate(1), spans.allocate(65)
    assert first is not None and second is not None
    assert (first.length, first.footprint, second.footprint) == (1, 64, 128)
    assert (first.offset % GRANULE_BYTES, second.offset % GRANULE_BYTES) == (0, 0)
    assert (spans.used_bytes, spans.free_bytes, spans.num_live) == (192, 832, 2)


def test_the_smallest_hole_that_fits_is_used() -> None:
    spans = SpanAllocator(0, 1024)
    small = _allocated(spans, 128)
    _allocated(spans, 64)
    large = _allocated(spans, 256)
    _allocated(spans, 64)
    spans.free(large)
    spans.free(small)
    assert _allocated(spans, 100).offset == small.offset
    assert _allocated(spans, 200).offset == large.offset


def test_free_neighbours_become_one_hole() -> None:
    spans = SpanAllocator(0, 256)
    pieces = [_allocated(spans, 64) for _ in range(4)]
    assert spans.allocate(1) is None
    for index in (0, 2, 3, 1):
        spans.free(pieces[index])
    assert spans.largest_free_bytes == 256
    assert _allocated(spans, 256).offset == 0


def test_a_span_freed_once_cannot_be_freed_or_used_again() -> None:
    spans = SpanAllocator(0, 256)
    old = _allocated(spans, 64)
    spans.free(old)
    with pytest.raises(StaleSpan):
        spans.free(old)
    successor = _allocated(spans, 64)
    assert successor.offset == old.offset
    for stale in (old, Span(64, 64, 1), Span(successor.offset, 63, successor.generation)):
        with pytest.raises(StaleSpan):
            spans.require_live(stale)
    spans.require_live(successor)


@pytest.mark.parametrize(("start", "end"), [(1, 64), (0, 65), (64, 64), (-64, 64)])
def test_a_range_that_is_not_whole_granules_is_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="whole granules"):
        SpanAllocator(start, end)


def test_a_span_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        SpanAllocator(0, 64).allocate(0)


class AnySequenceOfSpans(RuleBasedStateMachine):
    """Against the plainest model there is: which granules are taken, and by whom."""

    GRANULES = 40

    def __init__(self) -> None:
        super().__init__()
        self.spans = SpanAllocator(GRANULE_BYTES, (self.GRANULES + 1) * GRANULE_BYTES)
        self.live: list[Span] = []
        self.stale: list[Span] = []
        self.taken = [False] * (self.GRANULES + 1)
        self.taken[0] = True

    def _granules(self, span: Span) -> range:
        first = span.offset // GRANULE_BYTES
        return range(first, first + span.footprint // GRANULE_BYTES)

    def _longest_hole(self) -> int:
        runs = "".join(".x"[taken] for taken in self.taken).split("x")
        return max(map(len, runs)) * GRANULE_BYTES

    @rule(length=st.integers(1, 700))
    def allocate(self, length: int) -> None:
        span = self.spans.allocate(length)
        if span is None:
            assert self._longest_hole() < length
            return
        assert span.length == length
        for granule in self._granules(span):
            assert not self.taken[granule]
            self.taken[granule] = True
        self.live.append(span)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        span = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.spans.free(span)
        for granule in self._granules(span):
            self.taken[granule] = False
        self.stale.append(span)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def free_again(self, data: st.DataObject) -> None:
        with pytest.raises(StaleSpan):
            self.spans.free(data.draw(st.sampled_from(self.stale)))

    @invariant()
    def whole(self) -> None:
        self.spans.check()
        assert self.spans.num_live == len(self.live)
        assert self.spans.largest_free_bytes == self._longest_hole()
        assert self.spans.used_bytes == (sum(self.taken) - 1) * GRANULE_BYTES


TestAnySequenceOfSpans = AnySequenceOfSpans.TestCase
TestAnySequenceOfSpans.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def _allocated(spans: SpanAllocator, length: int) -> Span:
    span = spans.allocate(length)
    assert span is not None
    return span
