"""Row-invariant building blocks: a row's result is the same bits whatever rows stand beside it.

Serving cuts prompts into chunks and mixes sequences in one batch, so a token may be computed
beside 0 or 500 others. These are the few operations whose torch kernels would otherwise let that
show (measured on torch 2.13, x86-64, one thread; `tests/model1/test_numerics.py` holds it):

* float32 matrix products take another path below 4 rows: fewer rows are padded to 4; batched ones
  also for matrices of fewer than 400 multiplications: rows are added; and products with a single
  column do in all sizes: a second one of zeros is computed with it;
* bfloat16 ones, and all with packed weights, do for single rows where the sums are longer than
  1,024; plain bfloat16 ones also wherever the whole product has at most 4,096 multiplications:
  rows are added until it is neither;
* products with `HalfMatrix` treat the last one or two rows in another way than the rest, unless
  there are a multiple of three (with AVX2; 1 to 600 rows were tried): rows are added;
* float32 `sigmoid`, `silu` and `softplus` round differently in the vector tail, so they are
  composed here from `exp`, `log1p` and division, which do not. `addcmul` and complex
  products have the same fault: multiply and add separately.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model1.compiled import Floats, compiled, floats, on_cpu

_MIN_ROWS = 4
_packed_product = torch.ops.mkldnn._linear_pointwise.default
# The operator itself: its wrapper looks through all arguments, which takes as long as a product.
_half_product = torch.ops.quantized.linear_dynamic_fp16.default._op
_HALF_ENGINES = ("x86", "fbgemm")  # of torch's, with a float16 matrix product
_HALF_ROWS = 3
_PACKED_FOR_ROWS = 32  # a hint to oneDNN; measured best from 1 to 32 rows
_LONG_SUM = 1024
_SMALL_PRODUCT = 4096
_SMALL_MATRIX = 400


@dataclass(frozen=True, slots=True)
class HalfMatrix:
    """A matrix `[N, K]` kept in float16, without loss.

    `packed` is the matrix times a power of two, `unscale [1]` float32 the inverse of that power.
    Products are float32 throughout, rounded to x's dtype at the end.
    """

    packed: torch.ScriptObject
    unscale: Tensor


PackedMatrix = Tensor | HalfMatrix


def pack(weight: Tensor) -> PackedMatrix:
    """`weight [N, K]` re-laid for the CPU's matrix unit, if it has one; for `linear` only.

    A plain weight is re-laid in every product, which for a few rows costs more than the product:
    packed, small batches run at the speed of reading the weight once (1.7 to 3 times as fast,
    README). The result's bits are `linear`'s own for packed weights in every batch, and in
    bfloat16 those of the plain weight where the CPU has a unit for them.

    A float32 weight whose values float16 can hold, as those of a bfloat16 checkpoint nearly
    always are, is packed as a `HalfMatrix`: half of the reading again. So is a bfloat16 weight
    where the CPU has no unit for them: torch's own products are then up to 20 times as slow.
    """
    if weight.device.type != "cpu":
        return weight
    has_unit = torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if weight.dtype == torch.float32 or not has_unit:
        half = _packed_half(weight.detach().float())
        if half is not None:
            return half
    if not has_unit:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR_ROWS)
    return packed


def _packed_half(weight: Tensor) -> HalfMatrix | None:
    """None if a value would change, or without the kernel."""
    largest = float(weight.abs().max())
    if torch.backends.quantized.engine not in _HALF_ENGINES or not 2**-16 < largest < 2**16:
        return None  # the bounds: no row that is scaled in turn overflows or vanishes
    # The largest value just below 2^15, so that the small ones keep their bits.
    scale = 2.0 ** (15 - math.frexp(largest)[1])
    scaled = weight * scale
    if not torch.equal(scaled.half().float(), scaled):
        return None
    return HalfMatrix(
        torch.ops.quantized.linear_prepack_fp16(scaled, None), torch.tensor([1.0 / scale])
    )


def linear(x: Tensor, weight: PackedMatrix) -> Tensor:
    """`x [T, K] @ weight [N, K]^T -> [T, N]`, dtype of both; `weight` plain or from `pack`."""
    rows = x.shape[0]
    if isinstance(weight, HalfMatrix):
        spare = -rows % _HALF_ROWS
        if rows == 1:
            x, spare = x.expand(_HALF_ROWS, -1), 0
        scaled = x * weight.unscale  # float32, also if x is not
        if spare:
            scaled = torch.constant_pad_nd(scaled, (0, 0, 0, spare))
        product: Tensor = _half_product(scaled, weight.packed)
        return product[:rows].to(x.dtype)
    if weight.is_mkldnn:
        padded = max(rows, _MIN_ROWS) if x.shape[1] > _LONG_SUM else rows
        if padded > rows:
            x = F.pad(x, (0, 0, 0, padded - rows))
        out: Tensor = _packed_product(x, weight, None, "none", [], "")
        return out[:rows] if padded > rows else out
    if weight.shape[0] == 1:
        return linear(x, F.pad(weight, (0, 0, 0, 1)))[:, :1]
    padded = _padded_rows(rows, weight.shape[1], weight.numel(), x.dtype)
    if padded > rows:
        return F.linear(F.pad(x, (0, 0, 0, padded - rows)), weight)[:rows]
    return F.linear(x, weight)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a [B, T, K] @ b [B, K, N] -> [B, T, N]`; rows are the T of each matrix."""
    rows = a.shape[1]
    padded = _padded_rows(rows, b.shape[1], b.numel(), a.dtype)
    padded = max(padded, _SMALL_MATRIX // (b.shape[1] * b.shape[2]) + 1)
    if padded > rows:
        return torch.bmm(F.pad(a, (0, 0, 0, padded - rows)), b)[:, :rows]
    return torch.bmm(a, b)


def _padded_rows(rows: int, sum_length: int, products_per_row: int, dtype: torch.dtype) -> int:
    if dtype == torch.float32 or sum_length > _LONG_SUM:
        rows = max(rows, _MIN_ROWS)
    if dtype == torch.float32:
        return rows
    return max(rows, _SMALL_PRODUCT // products_per_row + 1)


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    out = torch.empty(x.shape)
    weights = floats(weight).reshape(-1, width)
    rows = floats(x.float()).reshape(-1, width)
    _rms_norm_rows(rows, weights, np.float32(eps), out.numpy().reshape(-1, width))
    return out.to(x.dtype)


@on_cpu(_rms_norm_cpu)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: float32 inside, one rounding to `x.dtype` at the end.

    `weight` may be one for all, or one for each of the dimensions before.
    """
    return F.rms_norm(x.float(), (x.shape[-1],), None, eps).mul_(weight).to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """float32 logistic function."""
    return x.neg().exp_().add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """float32 `x * sigmoid(x)`."""
    return x / x.neg().exp_().add_(1.0)


def softplus(x: Tensor) -> Tensor:
    """float32 `log(1 + exp(x))`, without overflow above or underflow below (trap T11)."""
    return x.abs().neg_().exp_().log1p_().add_(x.clamp_min(0.0))


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU: `[..., 2 * I]`, the gates and then the ups, -> float32 `[..., I]`.

    The gate is clamped from above only, up on both sides (trap T10).
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return silu(gate.clamp_max(limit)).mul_(up.clamp(-limit, limit))


@compiled
def _rms_norm_rows(x: Floats, weights: Floats, eps: np.float32, out: Floats) -> None:
    rows, width = x.shape
    for row in range(rows):
        squares = np.float32(0.0)
        for i in range(width):
            squares += x[row, i] * x[row, i]
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for i in range(width):
            out[row, i] = x[row, i] * inverse * weights[row % len(weights), i]
