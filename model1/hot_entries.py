"""CSA entries in host memory, and the few that the indexer chooses on the device.

A decode step reads `index_topk` entries of each sequence however long it is, and mostly those that
the step before read. So the array of all entries may live in host memory: the device holds a
buffer of the entries used last, of all layers and sequences, and only what is missing there is
copied. What is read is the same bits from either place.

The table of what lies where is kept on the host. Whatever a buffer's size, every gather works: one
of more rows than the buffer has (a prompt's tile: queries times topk) reads host memory directly.
"""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model1.kv_arrays import UnitArray

_Ints = npt.NDArray[np.int64]
_NOWHERE = -1
_SWEEP = 1024  # slots that the hand looks at together


@dataclass(frozen=True, slots=True)
class EntryTraffic:
    """Entries that attention asked for: found on the device, copied to it, or read past it."""

    hits: int = 0
    misses: int = 0
    bypassed: int = 0


class HotSlots:
    """Which of many rows are in which of a few slots: a CLOCK cache, whole batches at a time.

    The hand passes over slots used since it came by last, and takes the others. To be put there is
    not to be used: what is asked for once leaves before what is asked for again. Knows numbers
    only.
    """

    def __init__(self, num_rows: int, num_slots: int) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        # Both end in an element for _NOWHERE, so that empty slots and absent rows need no masks.
        self._slot_of = np.full(num_rows + 1, _NOWHERE, np.int64)
        self._row_of = np.full(num_slots, _NOWHERE, np.int64)
        self._used = np.zeros(num_slots + 1, np.bool_)  # since the hand came by
        self._kept = np.zeros(num_slots + 1, np.bool_)  # while slots are looked for
        self._hand = 0

    def place(self, rows: _Ints) -> tuple[_Ints, _Ints, _Ints]:
        """`rows [N] -> (slots [N], new_rows [M], new_slots [M])`, N at most `num_slots`.

        The new rows, each once, were in no slot: the caller fills theirs.
        """
        slots = self._slot_of[rows]
        self._used[slots] = True
        absent = slots == _NOWHERE
        if not absent.any():
            return slots, rows[:0], slots[:0]
        new_rows = np.unique(rows[absent])
        new_slots = self._evict(len(new_rows), slots)
        self._slot_of[new_rows] = new_slots
        self._row_of[new_slots] = new_rows
        return self._slot_of[rows], new_rows, new_slots

    def forget(self, rows: _Ints | slice) -> None:
        """These rows change: what the slots hold of them is of no use."""
        slots = self._slot_of[rows]
        slots = slots[slots != _NOWHERE]
        self._slot_of[rows] = _NOWHERE
        self._row_of[slots] = _NOWHERE
        self._used[slots] = False

    def _evict(self, count: int, kept: _Ints) -> _Ints:
        """Empty `count` slots that are not among `kept`."""
        self._kept[kept] = True
        taken = np.zeros(0, np.int64)
        while len(taken) < count:
            passed = np.arange(self._hand, min(self._hand + _SWEEP, self.num_slots))
            unused = passed[~(self._used[passed] | self._kept[passed])][: count - len(taken)]
            taken = np.concatenate([taken, unused])
            self._kept[unused] = True  # the hand may come by again
            if len(taken) == count:
                passed = passed[: unused[-1] + 1 - self._hand]
            self._used[passed] = False
            self._hand = (self._hand + len(passed)) % self.num_slots
        self._kept[kept] = self._kept[taken] = False
        self._slot_of[self._row_of[taken]] = _NOWHERE
        return taken


class HotEntries:
    """An array in host memory, with a buffer of `num_slots` of its rows on `device`."""

    def __init__(self, array: UnitArray, num_slots: int, device: torch.device) -> None:
        self.spec = array.spec
        self._host = array.tensor.flatten(0, 2)  # [rows, width]
        self._hot = torch.zeros(num_slots, array.spec.width, dtype=array.spec.dtype, device=device)
        self._lock = threading.Lock()  # of what follows, and of the buffer's contents
        self._slots = HotSlots(len(self._host), num_slots)
        self._traffic = EntryTraffic()

    @property
    def traffic(self) -> EntryTraffic:
        return self._traffic

    def rows_of(self, layer: int) -> "HotRows":
        return HotRows(self, self.spec.layers.index(layer))

    def gather(self, rows: Tensor) -> Tensor:
        """`rows [...]`, numbered through all units and layers -> `[..., width]` on the device.

        Bytes stay bytes; all else is float32.
        """
        wanted = rows.flatten().cpu()
        device = self._hot.device
        if len(wanted) > self._slots.num_slots:
            self._count(bypassed=len(wanted))
            values = self._host.index_select(0, wanted).to(device)
        else:
            with self._lock:
                slots, new_rows, new_slots = self._slots.place(wanted.numpy())
                if len(new_rows):
                    new = self._host.index_select(0, torch.from_numpy(new_rows)).to(device)
                    self._hot.index_copy_(0, torch.from_numpy(new_slots).to(device), new)
                self._count(hits=len(wanted) - len(new_rows), misses=len(new_rows))
                values = self._hot.index_select(0, torch.from_numpy(slots).to(device))
        values = values.float() if values.is_floating_point() else values
        return values.view(*rows.shape, -1)

    def write(self, rows: Tensor, values: Tensor) -> None:
        rows = rows.cpu()
        self._host.index_copy_(0, rows, values.cpu())
        with self._lock:
            self._slots.forget(rows.numpy())

    def forget_unit(self, unit: int) -> None:
        """The unit's rows are written in host memory, by others."""
        first = unit * self.spec.unit_rows
        with self._lock:
            self._slots.forget(slice(first, first + self.spec.unit_rows))

    def _count(self, *, hits: int = 0, misses: int = 0, bypassed: int = 0) -> None:
        past = self._traffic
        self._traffic = EntryTraffic(
            past.hits + hits, past.misses + misses, past.bypassed + bypassed
        )


class HotRows:
    """`KVRows` of one layer, in host memory but for those used last."""

    def __init__(self, entries: HotEntries, place: int) -> None:
        """`place` is the layer's among the array's."""
        self.per_unit = entries.spec.rows
        self.unit_stride = entries.spec.unit_rows
        self.dtype = entries.spec.dtype
        self._entries = entries
        self._first = place * self.per_unit

    def write(self, numbers: Tensor, values: Tensor) -> None:
        self._entries.write(numbers + self._first, values)

    def gather(self, numbers: Tensor) -> Tensor:
        return self._entries.gather(numbers + self._first)

    def gather_units(self, units: Tensor) -> Tensor:
        place = torch.arange(self.per_unit, device=units.device)
        numbers = units.unsqueeze(-1) * self.unit_stride + place  # [G, B, rows]
        return self.gather(numbers.flatten(1))
