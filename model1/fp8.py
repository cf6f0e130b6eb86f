"""FP8 records: rows of KV state in little more than half of their bfloat16 bytes. Spec section 4.

`Fp8Record` is a row of keys and values (section 4.1), for any head size. A row of d dims, the last
r of them rotary, becomes

    [0, n)                 d - r = n codes e4m3, one a dim
    [n, n + 2r)            the rotary dims in bfloat16, little-endian
    [n + 2r, n + 2r + s)   s = ceil(n / 64) scales ue8m0: a byte b means 2^(b - 127)
    then zeros             up to a multiple of 8 bytes

which is 584 bytes for d = 512, r = 64: the record of the releases. A tile of 64 dims shares a
scale; where n is no multiple of 64 the last tile is shorter, and where n = 0 there is none.

`Fp8IndexKey` is an index key of d dims (section 4.4): d codes e4m3, then their one scale, a power
of two in float32; 132 bytes for d = 128.

A record is whole: its scales stand behind its dims, not behind its page's as in the planar pages
that FlashMLA reads (trap T15). So one gather of rows fetches all, and rows can be moved one by
one. The bytes themselves are those of a planar page, in another order.

What is written is what is read: decoding is exact, in bfloat16 as in float32, and a row of zero
bytes is a row of zeros. All work is elementwise, so a row's bits do not depend on its neighbours.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_DIMS = 64
_ALIGNMENT_BYTES = 8
_MIN_SCALE_BYTE = 105  # 2^-22 = 2^ceil(log2(1e-4 / 448)): a smaller tile is scaled as one of 1e-4


def _number(value: float, dtype: torch.dtype) -> Tensor:
    """For an operation in place. Of a Python number torch makes such a tensor at every call, which
    for a few rows takes longer than the operation.
    """
    return torch.tensor(value, dtype=dtype)


_MAGNITUDE_BITS = _number(0x7FFF, torch.int16)
_ROUND_UP = _number(0x1F - (8 << 7), torch.int16)
_MANTISSA_BITS = _number(7, torch.int16)
_INVERSE = _number(254, torch.int16)
_TO_FLOAT16 = _number(1 << 7, torch.int16)
_FLOAT16_BITS = _number(-0x4080, torch.int16)  # sign, the lower 4 of exponent, 3 of mantissa
_FLOAT16_GAP = _number(2.0**8, torch.float32)


class RowRecord(Protocol):
    """A fixed-size encoding of rows."""

    @property
    def num_bytes(self) -> int: ...

    def encode(self, rows: Tensor) -> Tensor:
        """`rows [..., dims]`, float32 or bfloat16 -> records `[..., num_bytes]` uint8.

        Rows are rounded to bfloat16 first. A tile that is not finite is read back as not finite,
        and so is one beyond 448 * 2^119 (3e38), whose scale times a code would overflow.
        """
        ...

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        """Records `[..., num_bytes]` -> rows `[..., dims]` of `dtype`, float32 or bfloat16."""
        ...


@dataclass(frozen=True, slots=True)
class Fp8Record:
    """The record of rows of `head_dim` dims, a multiple of 4; the last `rope_dim`, even, rotary."""

    head_dim: int
    rope_dim: int

    @property
    def code_dims(self) -> int:
        return self.head_dim - self.rope_dim

    @property
    def num_tiles(self) -> int:
        return -(-self.code_dims // TILE_DIMS)

    @property
    def scales_start(self) -> int:
        return self.code_dims + 2 * self.rope_dim

    @property
    def num_bytes(self) -> int:
        return -(-(self.scales_start + self.num_tiles) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    def encode(self, rows: Tensor) -> Tensor:
        n, padding = self.code_dims, self.num_bytes - self.scales_start - self.num_tiles
        rows = rows.to(torch.bfloat16)
        rotary = rows.view(torch.uint8)[..., 2 * n :]
        if n == 0:
            return F.pad(rotary, (0, padding))
        coded = rows[..., :n]
        if n % TILE_DIMS:
            coded = F.pad(coded, (0, -n % TILE_DIMS))
        codes, scales = _quantise(coded.unflatten(-1, (-1, TILE_DIMS)))
        return torch.cat([codes.flatten(-2)[..., :n], rotary, F.pad(scales, (0, padding))], dim=-1)

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        n, r, s = self.code_dims, self.rope_dim, self.num_tiles
        sizes = (n, 2 * r, s, self.num_bytes - self.scales_start - s)
        codes, rotary, scales, _ = records.split_with_sizes(sizes, -1)
        rows = torch.empty(*records.shape[:-1], n + r, dtype=dtype, device=records.device)
        row_values, row_rotary = rows.split_with_sizes((n, r), -1)
        row_rotary.copy_(rotary.view(torch.bfloat16))
        values, scales = _code_values(codes), _scale_values(scales)
        if n % TILE_DIMS == 0:
            values.unflatten(-1, (s, TILE_DIMS)).mul_(scales.unsqueeze(-1))
        else:
            values.mul_(scales.repeat_interleave(TILE_DIMS, dim=-1)[..., :n])
        row_values.copy_(values)
        return rows


@dataclass(frozen=True, slots=True)
class Fp8IndexKey:
    """The record of index keys of `dims` dims."""

    dims: int

    @property
    def num_bytes(self) -> int:
        return self.dims + 4

    def encode(self, rows: Tensor) -> Tensor:
        codes, byte = _quantise(rows.to(torch.bfloat16).unsqueeze(-2))
        scale = (byte.squeeze(-1).int() << 23).unsqueeze(-1).view(torch.uint8)
        return torch.cat([codes.squeeze(-2), scale], dim=-1)

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        # A copy: a scale may stand where no float32 can be read from.
        scale = records[..., self.dims :].clone(memory_format=torch.contiguous_format)
        values = _code_values(records[..., : self.dims])
        return values.mul_(scale.view(torch.float32).mul_(_FLOAT16_GAP)).to(dtype)


def _quantise(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., s, w]` bfloat16 -> codes `[..., s, w]` and scale bytes `[..., s]`, both uint8."""
    # The bits of non-negative bfloat16 numbers have the numbers' order; NaN is above infinity.
    peak = tiles.view(torch.int16).bitwise_and(_MAGNITUDE_BITS).amax(dim=-1)
    # ceil(log2(peak / 448)) + 127, exact, unlike a logarithm. As 448 = 1.75 * 2^8 it is the biased
    # exponent - 8, and one more for a mantissa above 1.75: adding 0x1F carries into the exponent.
    byte = peak.add_(_ROUND_UP).bitwise_right_shift_(_MANTISSA_BITS).clamp_min_(_MIN_SCALE_BYTE)
    inverse = (_INVERSE - byte).bitwise_left_shift_(_MANTISSA_BITS).view(torch.bfloat16)
    # Exact but for what is below half of the smallest code; within 448 of zero by construction.
    scaled = tiles * inverse.unsqueeze(-1)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), byte.to(torch.uint8)


def _code_values(codes: Tensor) -> Tensor:
    """e4m3 codes, uint8 -> float32 that are too small by 2^8.

    An e4m3 number shifted into place is a float16 one with the same mantissa and an exponent that
    is 8 lower, subnormals too. torch's own conversion takes 4 times as long on a CPU (2.13).
    """
    bits = codes.view(torch.int8).to(torch.int16).mul_(_TO_FLOAT16).bitwise_and_(_FLOAT16_BITS)
    return bits.view(torch.float16).float()


def _scale_values(scales: Tensor) -> Tensor:
    """ue8m0 bytes -> float32, too large by the 2^8 that `_code_values` leaves out."""
    return scales.view(torch.float8_e8m0fnu).float().mul_(_FLOAT16_GAP)
