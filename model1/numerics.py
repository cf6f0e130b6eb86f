"""Row-invariant building blocks: a row's result is the same bits whatever rows stand beside it.

Serving cuts prompts into chunks and mixes sequences in one batch, so a token may be computed
beside 0 or 500 others. These are the few operations whose torch kernels would otherwise let that
show (measured on torch 2.13, x86-64, one thread; `tests/model1/test_numerics.py` holds it):

* float32 matrix products take another path below 4 rows: fewer rows are padded to 4;
* float32 `sigmoid`, `silu` and `softplus` round differently in the vector tail, so they are
  composed here from `exp`, `log1p` and division, which do not. `addcmul` and complex
  products have the same fault: multiply and add separately.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_FLOAT32_ROWS = 4


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x [T, K] @ weight [N, K]^T -> [T, N]`, dtype of both."""
    rows = x.shape[0]
    if x.dtype == torch.float32 and rows < _MIN_FLOAT32_ROWS:
        return F.linear(F.pad(x, (0, 0, 0, _MIN_FLOAT32_ROWS - rows)), weight)[:rows]
    return F.linear(x, weight)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a [B, T, K] @ b [B, K, N] -> [B, T, N]`; rows are the T of each matrix."""
    rows = a.shape[1]
    if a.dtype == torch.float32 and rows < _MIN_FLOAT32_ROWS:
        return torch.bmm(F.pad(a, (0, 0, 0, _MIN_FLOAT32_ROWS - rows)), b)[:, :rows]
    return torch.bmm(a, b)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension: float32 inside, one rounding to `x.dtype` at the end."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """float32 logistic function."""
    return torch.exp(-x).add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """float32 `x * sigmoid(x)`."""
    return x / torch.exp(-x).add_(1.0)


def softplus(x: Tensor) -> Tensor:
    """float32 `log(1 + exp(x))`, without overflow above or underflow below (trap T11)."""
    return x.clamp_min(0.0) + torch.log1p(torch.exp(-x.abs()))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU in float32: the gate from above only, up on both sides (trap T10)."""
    return silu(gate.float().clamp_max(limit)) * up.float().clamp(-limit, limit)
