"""The pool's arrays: rows for the model to read and write, bytes for what leaves the device.

An array lies unit by unit, all layers of a unit together, so that one unit is one contiguous copy.
A layer sees its rows of it as if they were alone. Knows nothing of who holds which unit.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model1.compiled import compiled, on_cpu
from model1.config import AttentionKind
from model1.fp8 import RowRecord
from model1.kv_layout import ArraySpec

Bytes: TypeAlias = npt.NDArray[np.uint8]
Index: TypeAlias = int | tuple[int | slice, ...]


class UnitArray:
    """One array, `tensor [units, layers, rows, width]`, zero at first."""

    def __init__(self, spec: ArraySpec, num_units: int, device: torch.device) -> None:
        shape = (num_units, len(spec.layers), spec.rows, spec.width)
        self.spec = spec
        self.tensor = torch.zeros(*shape, dtype=spec.dtype, device=device)
        self._bytes = self.tensor.view(torch.uint8)
        # Views, which copy at the speed of memory and cost no torch call.
        on_cpu = device.type == "cpu"
        self._host: Bytes | None = self._bytes.numpy() if on_cpu else None
        self._host_units: Bytes | None = self._bytes.flatten(1).numpy() if on_cpu else None

    def rows_of(self, layer: int) -> "Rows":
        return Rows(self.tensor, self.spec.layers.index(layer))

    def read_unit(self, unit: int, out: Bytes) -> None:
        """Copy one unit's bytes to `out [unit_nbytes]`."""
        if self._host_units is not None:
            out[:] = self._host_units[unit]
        else:
            self.read(unit, out)

    def write_unit(self, unit: int, data: Bytes) -> None:
        if self._host_units is not None:
            self._host_units[unit] = data
        else:
            self.write(unit, data)

    def read(self, index: Index, out: Bytes) -> None:
        """Copy the bytes at a basic index of `[units, layers, rows, width in bytes]`."""
        part = self._bytes[index].cpu().numpy() if self._host is None else self._host[index]
        out.reshape(part.shape)[...] = part

    def write(self, index: Index, data: Bytes) -> None:
        """The counterpart of `read`."""
        if self._host is not None:
            part = self._host[index]
            part[...] = data.reshape(part.shape)
        else:
            target = self._bytes[index]
            # Of a copy: torch warns of memory that it may not write to.
            target.copy_(torch.from_numpy(data.copy()).view(target.shape))


class KVRows(Protocol):
    """One layer's rows of an array, `per_unit` in each unit.

    A row's number is unit * `unit_stride` + its place in the unit: the same for all layers of the
    array, so that a step's index tensors serve them all.
    """

    per_unit: int
    unit_stride: int
    dtype: torch.dtype  # of the values that are written and read

    def write(self, numbers: Tensor, values: Tensor) -> None:
        """`numbers [N]`, `values [N, width]`."""

    def gather(self, numbers: Tensor) -> Tensor:
        """`numbers [...] -> [..., width]`, float32 as all that is computed from them."""

    def gather_units(self, units: Tensor) -> Tensor:
        """All rows of units, one after the other: `units [G, B] -> [G, B * rows, width]`."""


class Rows:
    """`KVRows` that are kept as they are, `units [units, rows, width]`. Bytes stay bytes."""

    def __init__(self, tensor: Tensor, place: int) -> None:
        _, layers, rows, _ = tensor.shape
        self.units = tensor[:, place]
        self.per_unit = rows
        self.unit_stride = layers * rows
        self.dtype = tensor.dtype
        self._by_number = tensor.flatten(0, 2)[place * rows :]

    def write(self, numbers: Tensor, values: Tensor) -> None:
        self._by_number.index_copy_(0, numbers, values)

    def gather(self, numbers: Tensor) -> Tensor:
        rows = taken(self._by_number, numbers.flatten(), 1, 1)
        return rows.view(*numbers.shape, rows.shape[-1])

    def gather_units(self, units: Tensor) -> Tensor:
        rows = taken(self._by_number, units.flatten(), self.unit_stride, self.per_unit)
        return rows.view(len(units), -1, rows.shape[-1])


class RecordRows:
    """`KVRows` that are kept as FP8 records. What is gathered is decoded, and nothing else."""

    def __init__(self, records: KVRows, record: RowRecord, dtype: torch.dtype) -> None:
        self.records = records
        self.per_unit = records.per_unit
        self.unit_stride = records.unit_stride
        self.dtype = dtype
        self._record = record

    def write(self, numbers: Tensor, values: Tensor) -> None:
        self.records.write(numbers, self._record.encode(values))

    def gather(self, numbers: Tensor) -> Tensor:
        return self._record.decode(self.records.gather(numbers), self.dtype).float()

    def gather_units(self, units: Tensor) -> Tensor:
        return self._record.decode(self.records.gather_units(units), self.dtype).float()


class LayerKV:
    """One layer's rows; which exist depends on the layer's kind.

    All are rows of `dtype`, however they are kept. `state` holds the compressor's open windows.
    """

    def __init__(
        self,
        layer: int,
        kind: AttentionKind,
        arrays: dict[str, UnitArray],
        dtype: torch.dtype,
        csa_entries: Callable[[int], KVRows],
    ) -> None:
        """`csa_entries` gives a layer's rows of that array, wherever they are."""

        def rows_of(name: str) -> KVRows:
            rows = csa_entries(layer) if name == "csa_entries" else arrays[name].rows_of(layer)
            record = arrays[name].spec.record
            return rows if record is None else RecordRows(rows, record, dtype)

        self.window = rows_of("window")
        if kind is AttentionKind.CSA:
            self.entries = rows_of("csa_entries")
            self.index_keys = rows_of("index_keys")
            self.state = arrays["csa_state"].rows_of(layer)
        elif kind is AttentionKind.HCA:
            self.entries = rows_of("hca_entries")
            self.state = arrays["hca_state"].rows_of(layer)


def _taken_cpu(table: Tensor, units: Tensor, stride: int, per_unit: int) -> Tensor:
    if table.dtype is not torch.bfloat16:
        return _taken_plain(table, units, stride, per_unit)
    out = torch.empty(len(units) * per_unit, table.shape[1])
    bits = table.view(torch.int16).numpy()
    _widen_rows(bits, units.numpy(), stride, per_unit, out.numpy().view(np.int32))
    return out


def _taken_plain(table: Tensor, units: Tensor, stride: int, per_unit: int) -> Tensor:
    if per_unit > 1 or stride > 1:
        place = torch.arange(per_unit, device=units.device)
        units = (units.unsqueeze(-1) * stride + place).flatten()
    # NOTE: index_select copies whole rows; indexing by a tensor takes three times as long.
    rows = table.index_select(0, units)
    return rows.float() if rows.is_floating_point() else rows


@on_cpu(_taken_cpu)
def taken(table: Tensor, units: Tensor, stride: int, per_unit: int) -> Tensor:
    """Rows `[unit * stride, + per_unit)` of the table for each of `units [N]`, float32."""
    return _taken_plain(table, units, stride, per_unit)


@compiled
def _widen_rows(
    table: npt.NDArray[np.int16],
    units: npt.NDArray[np.int64],
    stride: int,
    per_unit: int,
    out: npt.NDArray[np.int32],
) -> None:
    """A bfloat16's bits are the upper half of the same float32's."""
    width = table.shape[1]
    for n in range(len(units)):
        for place in range(per_unit):
            row, to = units[n] * stride + place, n * per_unit + place
            for i in range(width):
                out[to, i] = np.int32(table[row, i]) << 16
