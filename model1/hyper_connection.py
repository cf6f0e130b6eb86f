"""Manifold-constrained hyper-connections: n residual streams, mixed by a doubly stochastic matrix.

Spec section 2.1. All coefficients are float32. So are the streams that are passed here, since
each is read three times between two writes; their values are rounded to the model dtype.
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
    """Coefficients of one sublayer from the streams `[T, n, D]`.

    `fn [(2+n)n, n*D]`, `base [(2+n)n]`, `scale [3]` (of pre, post and comb).
    """
    raw = _normed_projection(streams, fn, config.rms_norm_eps)
    coefficients = _coefficients_numpy if raw.device.type == "cpu" else _coefficients
    return coefficients(raw, base, scale, config)


def _coefficients(raw: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Mix:
    n, eps = config.hc_mult, config.hc_eps
    pre = sigmoid(raw[:, :n] * scale[0] + base[:n]) + eps
    post = sigmoid(raw[:, n : 2 * n] * scale[1] + base[n : 2 * n]) * 2.0
    logits = (raw[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    comb = logits.softmax(dim=-1) + eps
    comb /= comb.sum(dim=-2, keepdim=True) + eps  # columns first: trap T2
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb /= comb.sum(dim=-1, keepdim=True) + eps
        comb /= comb.sum(dim=-2, keepdim=True) + eps
    return Mix(pre, post, comb)


def _coefficients_numpy(raw: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Mix:
    """The same, for the CPU: about 100 operations on a few floats, a third of torch's time.

    Tokens are the last dimension here, so that sums run over the first two in a fixed order.
    """
    n, eps = config.hc_mult, np.float32(config.hc_eps)
    scales = np.repeat(scale.numpy(), (n, n, n * n))[:, None]
    x = np.multiply(raw.numpy().T, scales, order="C")  # [(2+n)n, T]
    x += base.numpy()[:, None]
    gates = np.negative(x[: 2 * n])
    np.exp(gates, out=gates)
    gates += np.float32(1.0)
    np.reciprocal(gates, out=gates)

    logits = x[2 * n :].reshape(n, n, -1)
    logits -= np.maximum.reduce(logits, axis=1, keepdims=True)
    np.exp(logits, out=logits)
    # A border of eps makes every row and column sum come with its eps already added.
    bordered = np.full((n + 1, n + 1, x.shape[1]), eps, dtype=np.float32)
    comb, rows, columns = bordered[:n, :n], bordered[:n], bordered[:, :n]
    np.divide(logits, np.add.reduce(logits, axis=1, keepdims=True), out=comb)
    comb += eps
    total, divide = np.add.reduce, np.divide
    divide(comb, total(columns, 0), comb)
    for _ in range(config.hc_sinkhorn_iters - 1):
        divide(comb, total(rows, 1, keepdims=True), comb)
        divide(comb, total(columns, 0), comb)
    return Mix(
        torch.from_numpy((gates[:n] + eps).T),
        torch.from_numpy((gates[n:] * np.float32(2.0)).T),
        torch.from_numpy(comb.transpose(2, 0, 1)),
    )


def read(streams: Tensor, pre: Tensor) -> Tensor:
    """The sublayer's input, not rounded yet: `sum_j pre[j] * streams[j]` -> float32 `[T, D]`."""
    return torch.bmm(pre.unsqueeze(1), streams).squeeze(1)


def write(streams: Tensor, output: Tensor, coefficients: Mix) -> Tensor:
    """New streams: `post[k] * output + sum_j comb[j, k] * streams[j]` (transposed: trap T3).

    Their values are rounded to the dtype of `output [T, D]`.
    """
    added = coefficients.post.unsqueeze(-1) * output.unsqueeze(1)  # [T, n, D]
    added.baddbmm_(coefficients.comb.transpose(1, 2), streams)
    return added.to(output.dtype).float()


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> Tensor:
    """The head's learned mix of the streams: `[T, n, D]` -> float32 `[T, D]` (spec 2.7)."""
    raw = _normed_projection(streams, fn, config.rms_norm_eps)
    return read(streams, sigmoid(raw * scale + base) + config.hc_eps)


def _normed_projection(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    x = streams.flatten(1)  # [T, n*D]; one norm over all streams together
    return linear(x, fn) * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
