"""Manifold-constrained hyper-connections: n residual streams, mixed by a doubly stochastic matrix.

Spec section 2.1. All coefficients are float32; the streams stay in the model dtype.
T tokens, n streams, D hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.numerics import linear, sigmoid


class Mix(NamedTuple):
    """How one sublayer reads and writes the streams; float32."""

    pre: Tensor  # [T, n]
    post: Tensor  # [T, n]
    comb: Tensor  # [T, n, n], row = source stream, column = target stream


def mix(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> Mix:
    """Coefficients of one sublayer from the streams `[T, n, D]`.

    `fn [(2+n)n, n*D]`, `base [(2+n)n]`, `scale [3]`, float32.
    """
    n = config.hc_mult
    raw = _normed_projection(streams, fn, config.rms_norm_eps)
    pre = sigmoid(raw[:, :n] * scale[0] + base[:n]) + config.hc_eps
    post = 2.0 * sigmoid(raw[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (raw[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    return Mix(pre, post, sinkhorn(comb, config.hc_sinkhorn_iters, config.hc_eps))


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Project `[T, n, n]` logits onto doubly stochastic matrices (column first: trap T2)."""
    c = logits.softmax(dim=-1) + eps
    c = c / (c.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c /= c.sum(dim=-1, keepdim=True).add_(eps)
        c /= c.sum(dim=-2, keepdim=True).add_(eps)
    return c


def read(streams: Tensor, pre: Tensor) -> Tensor:
    """The sublayer's input: `sum_j pre[j] * streams[j]` -> `[T, D]` in the streams' dtype."""
    return (pre.unsqueeze(-1) * streams.float()).sum(dim=1).to(streams.dtype)


def write(streams: Tensor, output: Tensor, coefficients: Mix) -> Tensor:
    """New streams: `post[k] * output + sum_j comb[j, k] * streams[j]` (transposed: trap T3)."""
    kept = torch.bmm(coefficients.comb.transpose(1, 2), streams.float())  # [T, n, D]
    kept += coefficients.post.unsqueeze(-1) * output.float().unsqueeze(1)
    return kept.to(streams.dtype)


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> Tensor:
    """The head's learned mix of the streams: `[T, n, D] -> [T, D]` (spec section 2.7)."""
    raw = _normed_projection(streams, fn, config.rms_norm_eps)
    return read(streams, sigmoid(raw * scale + base) + config.hc_eps)


def _normed_projection(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    x = streams.flatten(1).float()  # [T, n*D]; one norm over all streams together
    return linear(x, fn) * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


