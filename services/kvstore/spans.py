"""Hands out spans of one contiguous range of addresses: best fit, free neighbours become one.

Plain numbers, no memory. A span that was freed is told from the one that has its place now by its
generation. Not thread-safe: its owner locks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

GRANULE_BYTES = 64  # a cache line: spans start on one and are rounded up to whole ones


@dataclass(frozen=True, slots=True)
class Span:
    """[offset, offset + length) of the range. `length` is what was asked for."""

    offset: int
    length: int
    generation: int

    @property
    def footprint(self) -> int:
        """The bytes that it takes of the range."""
        return -(-self.length // GRANULE_BYTES) * GRANULE_BYTES


class StaleSpan(LookupError):
    """The span is not allocated: freed already, or never handed out by this allocator."""

    def __init__(self, span: Span) -> None:
        super().__init__(f"{span} is not allocated")


class SpanAllocator:
    """The free and the live spans of [start, end), both multiples of the granule."""

    def __init__(self, start: int, end: int) -> None:
        if start % GRANULE_BYTES or end % GRANULE_BYTES or not 0 <= start < end:
            raise ValueError(f"[{start}, {end}) is not whole granules of {GRANULE_BYTES} bytes")
        self._range = (start, end)
        self._live: dict[int, Span] = {}  # by offset
        self._num_generations = 0
        # Every free hole four ways: by where it starts, by where it ends, by its size (the dict's
        # keys serve as an ordered set), and each size once in ascending order.
        self._hole_size: dict[int, int] = {}
        self._hole_ending: dict[int, int] = {}
        self._holes_of_size: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []
        self._add_hole(start, end - start)
        self.free_bytes = end - start

    @property
    def used_bytes(self) -> int:
        start, end = self._range
        return end - start - self.free_bytes

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def largest_free_bytes(self) -> int:
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, length: int) -> Span | None:
        """A span of `length` bytes, or None when no hole is large enough."""
        if length <= 0:
            raise ValueError(f"a span of {length} bytes")
        footprint = -(-length // GRANULE_BYTES) * GRANULE_BYTES
        fitting = bisect_left(self._sizes, footprint)
        if fitting == len(self._sizes):
            return None
        size = self._sizes[fitting]
        offset = next(reversed(self._holes_of_size[size]))
        self._remove_hole(offset, size)
        if size > footprint:
            self._add_hole(offset + footprint, size - footprint)
        self.free_bytes -= footprint
        self._num_generations += 1
        span = Span(offset, length, self._num_generations)
        self._live[offset] = span
        return span

    def free(self, span: Span) -> None:
        """Give a span back; raises StaleSpan unless it is live."""
        self.require_live(span)
        del self._live[span.offset]
        self.free_bytes += span.footprint
        start, end = span.offset, span.offset + span.footprint
        if end in self._hole_size:
            size = self._hole_size[end]
            self._remove_hole(end, size)
            end += size
        if start in self._hole_ending:
            before = self._hole_ending[start]
            self._remove_hole(before, start - before)
            start = before
        self._add_hole(start, end - start)

    def require_live(self, span: Span) -> None:
        if self._live.get(span.offset) != span:
            raise StaleSpan(span)

    def check(self) -> None:
        """Live spans and holes tile the range exactly, no two holes touch, the indexes agree."""
        start, end = self._range
        pieces = [(offset, span.footprint, True) for offset, span in self._live.items()]
        pieces += [(offset, size, False) for offset, size in self._hole_size.items()]
        was_live = True
        for offset, size, is_live in sorted(pieces):
            assert offset == start, f"[{start}, {offset}) is neither free nor live, or is both"
            assert is_live or was_live, f"two holes touch at {offset}"
            start, was_live = offset + size, is_live
        assert start == end, f"[{start}, {end}) is neither free nor live"
        assert self.free_bytes == sum(self._hole_size.values())
        assert self._hole_ending == {at + size: at for at, size in self._hole_size.items()}
        by_size = {(at, size) for size, holes in self._holes_of_size.items() for at in holes}
        assert by_size == set(self._hole_size.items())
        assert self._sizes == sorted(self._holes_of_size)

    def _add_hole(self, offset: int, size: int) -> None:
        self._hole_size[offset] = size
        self._hole_ending[offset + size] = offset
        holes = self._holes_of_size.get(size)
        if holes is None:
            holes = self._holes_of_size[size] = {}
            insort(self._sizes, size)
        holes[offset] = None

    def _remove_hole(self, offset: int, size: int) -> None:
        del self._hole_size[offset], self._hole_ending[offset + size]
        holes = self._holes_of_size[size]
        del holes[offset]
        if not holes:
            del self._holes_of_size[size], self._sizes[bisect_left(self._sizes, size)]
