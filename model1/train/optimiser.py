"""Muon for the matrices inside the layers, AdamW for everything else.

DeepSeek-V4 was trained the same way. Owns which parameter gets which; knows nothing of data.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MUON_LEAVES = ("wq_a", "wq_b", "wkv", "wgate", "wo_a", "wo_b", "w1", "w2", "w3", "w13")
# Left as `initial` builds them: trained, they learn to look past the very words that recall needs.
LOOK_BACK = tuple(f"layers.0.attn.{name}.weight" for name in ("wq_a", "wq_b", "wkv"))
_MOMENTUM = 0.95
_NEWTON_SCHULZ_STEPS = 5
# Quintic that pulls all singular values towards 1 quickly (Jordan et al., 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters are matrices or stacks of matrices `[E, m, n]`."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum: Tensor = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                update = orthogonalise(parameter.grad.lerp(momentum, _MOMENTUM))
                # Root mean square of the update, so that both share one learning rate. AdamW's is
                # 0.2 to 0.4 (Liu et al., 2025); the larger value suits a run this short.
                size = 0.6 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-rate * size)


def orthogonalise(matrices: Tensor) -> Tensor:
    """`[..., m, n]` -> nearest (semi-)orthogonal matrices, roughly, by Newton-Schulz."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x if wide else x.mT
    return result


def build(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> tuple[torch.optim.Optimizer, ...]:
    """The optimisers that together own all `parameters`, but those that no gradient moves.

    The caller sets their rate each step. The rest stops requiring gradients.
    """
    matrices, others, plain = [], [], []
    for name, parameter in parameters:
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("gate.bias") or name in LOOK_BACK:
            # The experts' load moves the bias, and nothing the first layer's look back.
            parameter.requires_grad_(False)
            continue
        if leaf in _MUON_LEAVES and "indexer" not in name:
            matrices.append(parameter)
        elif parameter.dim() >= 2 and not leaf.startswith("hc_"):
            others.append(parameter)
        else:
            plain.append(parameter)
    adam = torch.optim.AdamW(
        [
            {"params": others, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    return Muon(matrices, weight_decay), adam
