"""Bodies and tails: which bytes of the arrays they are, and the copies in and out.

A body is one unit of each BLOCK array, one after the other. A tail is the window rows `[layers,
W - 1, row]` (those before position 0 are zero), then the CSA states' rows of the previous window,
`[layers, csa_ratio, row]`.

Both are a handful of copies, each of all layers. Knows nothing of who holds which unit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from model1.kv_arrays import Bytes, Index, UnitArray
from model1.kv_layout import KVLayout, Unit

WritableBuffer: TypeAlias = bytearray | memoryview | Bytes
ReadableBuffer: TypeAlias = bytes | WritableBuffer

_Part: TypeAlias = tuple[UnitArray, Index, Bytes]
_EVERY = slice(None)


def readable(buffer: ReadableBuffer, nbytes: int) -> Bytes:
    """`buffer` as an array; it must be `nbytes` long."""
    array = np.frombuffer(buffer, np.uint8)
    assert array.nbytes == nbytes, f"{array.nbytes} bytes instead of {nbytes}"
    return array


def writable(buffer: WritableBuffer, nbytes: int) -> Bytes:
    """As `readable`, of memory that may be written."""
    array = readable(buffer, nbytes)
    assert array.flags.writeable
    return array


@dataclass(frozen=True, slots=True)
class TailPlace:
    """Where a sequence's tail at `position` lies: its slot, and the pages from `first_page`."""

    position: int
    slot: int
    first_page: int
    pages: tuple[int, ...]


class KVBytes:
    """The bytes of one pool's arrays."""

    def __init__(self, layout: KVLayout, arrays: Mapping[str, UnitArray]) -> None:
        self._layout = layout
        self._window = arrays["window"]
        self._state = arrays["csa_state"]
        self._body: list[tuple[UnitArray, slice]] = []
        self.body_nbytes = 0
        for array in arrays.values():
            if array.spec.unit is Unit.BLOCK:
                end = self.body_nbytes + array.spec.unit_nbytes
                self._body.append((array, slice(self.body_nbytes, end)))
                self.body_nbytes = end
        self.tail_nbytes = layout.tail_nbytes

    def read_body(self, block: int, out: Bytes) -> None:
        for array, part in self._body:
            array.read_unit(block, out[part])

    def write_body(self, block: int, data: Bytes) -> None:
        for array, part in self._body:
            array.write_unit(block, data[part])

    def read_tail(self, tail: TailPlace, out: Bytes) -> None:
        for array, index, part in self._tail_parts(tail, out):
            array.read(index, part)
        missing = max(0, self._layout.window - 1 - tail.position)
        self._window_rows(out)[:, :missing] = 0

    def write_tail(self, tail: TailPlace, data: Bytes) -> None:
        for array, index, part in self._tail_parts(tail, data):
            array.write(index, part)

    def _tail_parts(self, tail: TailPlace, buffer: Bytes) -> Iterator[_Part]:
        layout, rows = self._layout, self._window_rows(buffer)
        oldest = tail.position - (layout.window - 1)
        for number, page in enumerate(tail.pages, tail.first_page):
            page_start = number * layout.page_tokens
            start = max(page_start, oldest)
            end = min(page_start + layout.page_tokens, tail.position)
            inside = slice(start - page_start, end - page_start)
            yield self._window, (page, _EVERY, inside), rows[:, start - oldest : end - oldest]

        first = (tail.position - layout.csa_ratio) % layout.csa_state_rows
        previous_window = slice(first, first + layout.csa_ratio)
        yield self._state, (tail.slot, _EVERY, previous_window), buffer[rows.size :]

    def _window_rows(self, buffer: Bytes) -> Bytes:
        """`[layers, W - 1, bytes of a row]` of a tail."""
        spec = self._window.spec
        shape = (len(spec.layers), self._layout.window - 1, spec.row_nbytes)
        return buffer[: shape[0] * shape[1] * shape[2]].reshape(shape)
