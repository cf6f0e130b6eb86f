"""Rotary embedding: interleaved pairs on the trailing dimensions, float32 (traps T1, T6, T13).

A layer has one table: plain for sliding-window layers, YaRN for CSA and HCA (trap T4).
Rotations are made per step from the positions; no table of a million positions is kept.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model1.compiled import Floats, compiled, floats, on_cpu
from model1.config import ModelConfig, YarnConfig


class Rope:
    """The two inverse-frequency vectors of a model, float32 `[r/2]` on `device`."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        dim = config.qk_rope_head_dim
        self.main = _inverse_frequencies(config.rope_theta, dim, None).to(device)
        self.compress = _inverse_frequencies(config.compress_rope_theta, dim, config.yarn).to(
            device
        )


class Rotation(NamedTuple):
    """An angle for each row and pair: float32 `[T, r]`, both entries of a pair beside each other.

    `sin` carries the sign of the formula: (-sin, +sin) for the pair's (even, odd) entry.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, inverse_frequencies: Tensor) -> "Rotation":
        """Rotations for `positions [T]` int."""
        angles = positions.float().unsqueeze(-1) * inverse_frequencies
        sin = angles.sin()
        return cls(
            angles.cos().repeat_interleave(2, dim=-1), torch.stack((-sin, sin), -1).flatten(1)
        )

    def inverse(self) -> "Rotation":
        return Rotation(self.cos, -self.sin)


def _rotate_cpu_(x: Tensor, by: Rotation) -> Tensor:
    r = by.cos.shape[-1]
    tail = x[..., -r:]
    turned = tail.float().contiguous()
    heads = turned.numpy().reshape(len(x), math.prod(x.shape[1:-1]), r)
    _rotate_rows_(heads, floats(by.cos), floats(by.sin))
    tail.copy_(turned)
    return x


@on_cpu(_rotate_cpu_)
def rotate_(x: Tensor, by: Rotation) -> Tensor:
    """Turn the trailing `r` dimensions of `x [T, ..., d]` in place; returns `x`.

    Pairs are (2i, 2i+1); float32 inside. NOTE: not written with complex numbers, whose product
    torch rounds differently in the vector tail (see `model1.numerics`).
    """
    r = by.cos.shape[-1]
    shape = (-1, *[1] * (x.dim() - 2), r)
    tail = x[..., -r:]
    pairs = tail.float()
    swapped = pairs.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = pairs * by.cos.view(shape)
    tail.copy_(turned.add_(swapped.mul_(by.sin.view(shape))))
    return x


def _inverse_frequencies(theta: float, dim: int, yarn: YarnConfig | None) -> Tensor:
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    plain = 1.0 / powers
    if yarn is None:
        return plain

    def correction_dim(rotations_in_context: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations_in_context * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    stretched = 1.0 / (yarn.factor * powers)
    keep = 1 - ramp  # twice over, as transformers writes it: the same bits
    return stretched * (1 - keep) + plain * keep


@compiled
def _rotate_rows_(x: Floats, cos: Floats, sin: Floats) -> None:
    tokens, heads, r = x.shape
    for t in range(tokens):
        for h in range(heads):
            for i in range(0, r, 2):
                even, odd = x[t, h, i], x[t, h, i + 1]
                x[t, h, i] = even * cos[t, i] + odd * sin[t, i]
                x[t, h, i + 1] = odd * cos[t, i + 1] + even * sin[t, i + 1]
