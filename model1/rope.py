"""Rotary embedding: interleaved pairs on the trailing dimensions, float32 (traps T1, T6, T13).

A layer has one table: plain for sliding-window layers, YaRN for CSA and HCA (trap T4).
Rotations are complex numbers `[T, r/2]` made per step from the positions; no table of a million
positions is kept.
"""

import math

import torch
from torch import Tensor

from model1.config import ModelConfig, YarnConfig


class Rope:
    """The two inverse-frequency vectors of a model, float32 `[r/2]` on `device`."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        dim = config.qk_rope_head_dim
        self.main = _inverse_frequencies(config.rope_theta, dim, None).to(device)
        self.compress = _inverse_frequencies(config.compress_rope_theta, dim, config.yarn).to(
            device
        )


def rotations(positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """`positions [T]` int -> unit complex numbers complex64 `[T, r/2]`."""
    angles = positions.float().unsqueeze(-1) * inverse_frequencies
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotate the trailing `r` dimensions of `x [T, ..., d]` by `by [T, r/2]`; same shape, dtype.

    Pairs are (2i, 2i+1). The conjugate of `by` rotates back.
    """
    r = 2 * by.shape[-1]
    pairs = torch.view_as_complex(x[..., -r:].float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * by.view(by.shape[0], *[1] * (x.dim() - 2), -1)
    return torch.cat([x[..., :-r], torch.view_as_real(turned).flatten(-2).to(x.dtype)], dim=-1)


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
    keep = 1 - ramp
    return stretched * (1 - keep) + plain * keep
