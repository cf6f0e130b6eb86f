"""Manifold-constrained hyper-connections: n residual streams, mixed by a doubly stochastic matrix.

Spec section 2.1. All coefficients are float32. So are the streams that are passed here, since
each is read three times between two writes; their values are rounded to the model dtype.
T tokens, n streams, D hidden size.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model1.compiled import Floats, compiled, floats, on_cpu
from model1.config import ModelConfig
from model1.numerics import linear, sigmoid


class Mix(NamedTuple):
    """How one sublayer reads and writes the streams; float32."""

    pre: Tensor  # [T, n]
    post: Tensor  # [T, n]
    comb: Tensor  # [T, n, n], row = source stream, column = target stream


def _mix_cpu(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Mix:
    tokens, n = streams.shape[:2]
    at = Mix(torch.empty(tokens, n), torch.empty(tokens, n), torch.empty(tokens, n, n))
    _mix_rows(
        floats(streams.flatten(1)),
        floats(fn),
        floats(base),
        floats(scale),
        config.hc_sinkhorn_iters,
        np.float32(config.rms_norm_eps),
        np.float32(config.hc_eps),
        at.pre.numpy(),
        at.post.numpy(),
        at.comb.numpy(),
    )
    return at


@on_cpu(_mix_cpu)
def mix(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig) -> Mix:
    """Coefficients of one sublayer from the streams `[T, n, D]`.

    `fn [(2+n)n, n*D]`, `base [(2+n)n]`, `scale [3]` (of pre, post and comb).
    """
    n, eps = config.hc_mult, config.hc_eps
    raw = _normed_projection(streams, fn, config.rms_norm_eps)
    pre = sigmoid(raw[:, :n] * scale[0] + base[:n]) + eps
    post = sigmoid(raw[:, n : 2 * n] * scale[1] + base[n : 2 * n]) * 2.0
    logits = (raw[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    comb = logits.softmax(dim=-1) + eps
    comb /= comb.sum(dim=-2, keepdim=True) + eps  # columns first: trap T2
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb /= comb.sum(dim=-1, keepdim=True) + eps
        comb /= comb.sum(dim=-2, keepdim=True) + eps
    return Mix(pre, post, comb)


def _read_cpu(streams: Tensor, pre: Tensor) -> Tensor:
    out = streams.new_empty(streams.shape[0], streams.shape[2])
    _read_rows(floats(streams), floats(pre), out.numpy())
    return out


@on_cpu(_read_cpu)
def read(streams: Tensor, pre: Tensor) -> Tensor:
    """The sublayer's input, not rounded yet: `sum_j pre[j] * streams[j]` -> float32 `[T, D]`."""
    return torch.bmm(pre.unsqueeze(1), streams).squeeze(1)


def _write_cpu(streams: Tensor, output: Tensor, coefficients: Mix) -> Tensor:
    new = torch.empty_like(streams)
    _write_rows(
        floats(streams),
        floats(output.float()),
        floats(coefficients.post),
        floats(coefficients.comb),
        new.numpy(),
    )
    return new.to(output.dtype).float()


@on_cpu(_write_cpu)
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


@compiled
def _mix_rows(
    streams: Floats,
    fn: Floats,
    base: Floats,
    scale: Floats,
    iters: int,
    norm_eps: np.float32,
    eps: np.float32,
    pre: Floats,
    post: Floats,
    comb: Floats,
) -> None:
    one = np.float32(1.0)
    n, width = pre.shape[1], streams.shape[1]
    raw = np.empty(len(fn), np.float32)
    for t in range(len(streams)):
        x = streams[t]
        squares = np.float32(0.0)
        for i in range(width):
            squares += x[i] * x[i]
        inverse = one / np.sqrt(squares / np.float32(width) + norm_eps)
        for row in range(len(fn)):
            weights = fn[row]
            total = np.float32(0.0)
            for i in range(width):
                total += weights[i] * x[i]
            raw[row] = total * inverse * scale[min(row // n, 2)] + base[row]
        for k in range(n):
            pre[t, k] = one / (one + np.exp(-raw[k])) + eps
            post[t, k] = np.float32(2.0) / (one + np.exp(-raw[n + k]))
        c = comb[t]
        for j in range(n):
            logits = raw[(2 + j) * n : (3 + j) * n]
            peak = logits.max()
            total = np.float32(0.0)
            for k in range(n):
                c[j, k] = np.exp(logits[k] - peak)
                total += c[j, k]
            for k in range(n):
                c[j, k] = c[j, k] / total + eps
        for turn in range(iters):
            if turn > 0:  # columns first: trap T2
                for j in range(n):
                    total = eps
                    for k in range(n):
                        total += c[j, k]
                    for k in range(n):
                        c[j, k] /= total
            for k in range(n):
                total = eps
                for j in range(n):
                    total += c[j, k]
                for j in range(n):
                    c[j, k] /= total


@compiled
def _read_rows(streams: Floats, pre: Floats, out: Floats) -> None:
    tokens, n, width = streams.shape
    for t in range(tokens):
        for i in range(width):
            out[t, i] = pre[t, 0] * streams[t, 0, i]
        for j in range(1, n):
            for i in range(width):
                out[t, i] += pre[t, j] * streams[t, j, i]


@compiled
def _write_rows(streams: Floats, output: Floats, post: Floats, comb: Floats, new: Floats) -> None:
    tokens, n, width = streams.shape
    for t in range(tokens):
        for k in range(n):
            for i in range(width):
                new[t, k, i] = post[t, k] * output[t, i]
            for j in range(n):
                for i in range(width):
                    new[t, k, i] += comb[t, j, k] * streams[t, j, i]
