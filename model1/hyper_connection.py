"""Manifold-constrained hyper-connections: n residual streams, mixed by a doubly stochastic matrix.

Spec section 2.1. All coefficients are float32; the streams stay in the model dtype.
T tokens, n streams, D hidden size.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.numerics import linear, sigmoid


class Mix(NamedTuple):
    """How one sublayer reads and writes the streams; float32."""

    pre: Tensor  # [T, n]
    post: Tensor  # [T, n]
    comb: Tensor  # [T, n, n], row = source stream, column = target stream


def mix(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Mix:
    """Coefficients of one sublayer from the streams `[T, n, D]`, float32.

    `fn [(2+n)n, n*D]`, `base [(2+n)n]`, `scale [3]` (of pre, post and comb).
    """
    n = config.hc_mult
    raw = _normed_projection(streams, fn, config.rms_norm_eps)
    raw *= scale.repeat_interleave(torch.tensor((n, n, n * n), device=scale.device))
    raw += base
    gates = sigmoid(raw[:, : 2 * n])
    logits = raw[:, 2 * n :].unflatten(-1, (n, n))
    return Mix(
        gates[:, :n] + config.hc_eps,
        gates[:, n:] * 2.0,
        sinkhorn(logits.softmax(dim=-1), config.hc_sinkhorn_iters, config.hc_eps),
    )


def sinkhorn(positive: Tensor, iters: int, eps: float) -> Tensor:
    """Scale positive `[T, n, n]` towards doubly stochastic matrices (columns first: trap T2)."""
    if positive.device.type == "cpu":
        return _sinkhorn_numpy(positive, iters, eps)
    c = positive + eps
    c /= c.sum(dim=-2, keepdim=True) + eps
    for _ in range(iters - 1):
        c /= c.sum(dim=-1, keepdim=True) + eps
        c /= c.sum(dim=-2, keepdim=True) + eps
    return c


def _sinkhorn_numpy(positive: Tensor, iters: int, eps: float) -> Tensor:
    """The same. 39 sums and divisions of a few floats cost torch five times as much in calls."""
    c = np.array(positive.numpy().transpose(1, 2, 0), order="C")  # a copy, [n, n, T]
    c += np.float32(eps)
    n = len(c)
    small = np.float32(eps)
    total = np.empty_like(c[0])
    by_row = [c[i] for i in range(n)]  # each [n, T]: entry j of row i
    by_column = [c[:, j] for j in range(n)]
    over_rows, over_columns = total[None], total[:, None]

    def normalise(parts: list[np.ndarray], divisor: np.ndarray) -> None:
        np.add(parts[0], small, out=total)
        for part in parts:
            if part is not parts[0]:
                np.add(total, part, out=total)
        np.divide(c, divisor, out=c)

    normalise(by_row, over_rows)  # the sum over rows: one for each column
    for _ in range(iters - 1):
        normalise(by_column, over_columns)
        normalise(by_row, over_rows)
    return torch.from_numpy(c.transpose(2, 0, 1))


def read(streams: Tensor, pre: Tensor) -> Tensor:
    """The sublayer's input: `sum_j pre[j] * streams[j]` -> `[T, D]` in the streams' dtype."""
    return (pre.unsqueeze(-1) * streams).sum(dim=1).to(streams.dtype)


def write(streams: Tensor, output: Tensor, coefficients: Mix) -> Tensor:
    """New streams: `post[k] * output + sum_j comb[j, k] * streams[j]` (transposed: trap T3)."""
    kept = torch.bmm(coefficients.comb.transpose(1, 2), streams.float())  # [T, n, D]
    kept += coefficients.post.unsqueeze(-1) * output.unsqueeze(1)
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
