"""What KV state a model has: each array's unit, layers, rows, width and dtype, in one place.

The pool allocates from this, blobs that leave the device are cut by it, and its digest tells
whether the bytes of one pool mean the same in another. Knows nothing of who holds which unit.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import torch

from model1.compiled import COMPILER
from model1.config import AttentionKind, ModelConfig
from model1.fp8 import Fp8IndexKey, Fp8Record, RowRecord

NUMERICS_VERSION = 5
"""Raised by every change after which the same tokens leave other bits in the KV state."""


class KVFormat(StrEnum):
    """How window rows, compressed entries and index keys are kept.

    Compressor states are rows of the model's dtype in both.
    """

    NATIVE = "native"  # in the model's dtype
    FP8 = "fp8"  # as records of `model1.fp8`, read back in the model's dtype


class Unit(StrEnum):
    """What an array is handed out by; see `model1.kv_pool`."""

    PAGE = "page"
    BLOCK = "block"
    SLOT = "slot"


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array `[units, len(layers), rows, width]`: `rows` rows for each unit and layer.

    A row is `width` numbers of `dtype`, or one `record` of so many bytes.
    """

    name: str
    unit: Unit
    layers: tuple[int, ...]
    rows: int
    width: int
    dtype: torch.dtype
    record: RowRecord | None = None

    @property
    def row_nbytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def unit_rows(self) -> int:
        """Rows of one unit, all layers."""
        return len(self.layers) * self.rows

    @property
    def unit_nbytes(self) -> int:
        """Bytes of one unit, all layers."""
        return self.unit_rows * self.row_nbytes


class _Row(NamedTuple):
    width: int
    dtype: torch.dtype
    record: RowRecord | None = None

    @classmethod
    def of(cls, record: RowRecord) -> "_Row":
        return cls(record.num_bytes, torch.uint8, record)


@dataclass(frozen=True)
class KVLayout:
    """Shapes of one model's KV state, the model's dtype, and how rows are kept."""

    window: int  # W tokens
    page_tokens: int  # W / 2
    block_tokens: int  # hca_ratio
    csa_per_block: int  # CSA entries in a block
    csa_state_rows: int  # 2 * csa_ratio: previous and current window
    hca_state_rows: int  # hca_ratio
    hidden_size: int
    head_dim: int
    rope_dim: int
    index_dim: int
    kinds: tuple[AttentionKind, ...]
    dtype: torch.dtype
    kv_format: KVFormat

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: torch.dtype, kv_format: KVFormat = KVFormat.NATIVE
    ) -> "KVLayout":
        return cls(
            window=config.sliding_window,
            page_tokens=config.sliding_window // 2,
            block_tokens=config.hca_ratio,
            csa_per_block=config.hca_ratio // config.csa_ratio,
            csa_state_rows=2 * config.csa_ratio,
            hca_state_rows=config.hca_ratio,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            rope_dim=config.qk_rope_head_dim,
            index_dim=config.index_head_dim,
            kinds=config.attention_kinds,
            dtype=dtype,
            kv_format=kv_format,
        )

    @property
    def csa_ratio(self) -> int:
        return self.csa_state_rows // 2

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """Every array by its name, those of no layer too. A block's parts lie in this order.

        Compressor states are the rows that compressors will project (`model1.compressor`).
        """
        every = tuple(range(len(self.kinds)))
        csa = tuple(i for i in every if self.kinds[i] is AttentionKind.CSA)
        hca = tuple(i for i in every if self.kinds[i] is AttentionKind.HCA)
        d, di, hidden = self.head_dim, self.index_dim, self.hidden_size
        row, key = _Row(d, self.dtype), _Row(di, self.dtype)
        if self.kv_format is KVFormat.FP8:
            row, key = _Row.of(Fp8Record(d, self.rope_dim)), _Row.of(Fp8IndexKey(di))
        specs = (
            ArraySpec("window", Unit.PAGE, every, self.page_tokens, *row),
            ArraySpec("csa_entries", Unit.BLOCK, csa, self.csa_per_block, *row),
            ArraySpec("index_keys", Unit.BLOCK, csa, self.csa_per_block, *key),
            ArraySpec("hca_entries", Unit.BLOCK, hca, 1, *row),
            ArraySpec("csa_state", Unit.SLOT, csa, self.csa_state_rows, hidden, self.dtype),
            ArraySpec("hca_state", Unit.SLOT, hca, self.hca_state_rows, hidden, self.dtype),
        )
        return {spec.name: spec for spec in specs}

    def nbytes(self, unit: Unit) -> int:
        """Bytes of one unit in all arrays."""
        return sum(spec.unit_nbytes for spec in self.arrays.values() if spec.unit is unit)

    @property
    def tail_nbytes(self) -> int:
        """Bytes of what a resume point keeps beside the blocks; see `model1.kv_pool`."""
        window, state = self.arrays["window"], self.arrays["csa_state"]
        rows = len(window.layers) * (self.window - 1) * window.row_nbytes
        return rows + state.unit_nbytes // 2  # of its two windows the previous one

    def digest(self, device: torch.device) -> bytes:
        """16 bytes that are equal where KV bytes mean the same, bit for bit.

        Covers shapes, dtypes, the format and `NUMERICS_VERSION`, and what else the bits of a
        computation hang on: the device type, torch's version and, on a CPU, its vector
        instructions and what compiles for it.
        """
        on_cpu = device.type == "cpu"
        facts = {
            "window": self.window,
            "block": self.block_tokens,
            "dtype": str(self.dtype),  # of what was computed, also where records hide it
            "format": self.kv_format,
            "arrays": [
                (spec.name, spec.layers, spec.rows, spec.width, str(spec.dtype))
                for spec in self.arrays.values()
            ],
            "numerics": NUMERICS_VERSION,
            "torch": torch.__version__,
            "device": device.type,
            "machine": platform.machine(),
            "vectors": torch.backends.cpu.get_cpu_capability() if on_cpu else "",
            "compiler": COMPILER if on_cpu else "",
        }
        encoded = json.dumps(facts, sort_keys=True).encode()
        return hashlib.blake2b(encoded, digest_size=16).digest()
