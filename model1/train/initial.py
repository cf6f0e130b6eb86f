"""Initial values of every parameter, before training. Knows nothing of data or optimisers."""

import math

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.moe import ExpertBank
from model1.trunk import Trunk

# Smaller than the paper's mixing would ever need: streams start as four equal, independent copies.
HC_SCALE = 0.01
HC_OFF_DIAGONAL = -6.0
EMBED_DEVIATION = 0.5
HEAD_DEVIATION = 0.02


@torch.no_grad()
def initialise(trunk: Trunk, bank: ExpertBank, seed: int) -> None:
    """Fill all parameters and the hash tables. Deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)
    depth = trunk.config.num_hidden_layers
    for module in (trunk, bank):
        for name, parameter in module.named_parameters():
            parameter.copy_(_value(name, parameter, trunk.config, depth, generator))
    # A direction that all tokens share: without one, a query at one distance is no different from
    # a query at another until training has made it, and copying what stood before starts late.
    draw = torch.empty(trunk.config.hidden_size)
    trunk.embed.weight += nn.init.normal_(draw, std=EMBED_DEVIATION, generator=generator)
    # Untied, yet equal in direction: a model that copies a token's embedding then says that token.
    trunk.head.weight.copy_(trunk.embed.weight * (HEAD_DEVIATION / EMBED_DEVIATION))
    for name, table in trunk.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(_hash_table(table, trunk.config, generator))


def _value(
    name: str, like: Tensor, config: ModelConfig, depth: int, generator: torch.Generator
) -> Tensor:
    n = config.hc_mult
    leaf = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
    if leaf.endswith("norm"):
        return torch.ones_like(like)
    if leaf.endswith("_scale"):
        return torch.full_like(like, HC_SCALE)
    if leaf.endswith("_base"):
        pre = torch.full((n,), -math.log(n - 1))  # sigmoid of it is 1/n: the streams' average
        if leaf == "hc_head_base":
            return pre
        comb = torch.full((n, n), HC_OFF_DIAGONAL).fill_diagonal_(0.0)
        return torch.cat([pre, torch.zeros(n), comb.flatten()])
    if leaf in ("bias", "attn_sink"):
        return torch.zeros_like(like)
    deviation = like.shape[-1] ** -0.5
    if leaf == "ape":
        deviation = 1.0  # each channel of an entry begins by preferring some places of its window
    elif leaf == "embed":
        deviation = EMBED_DEVIATION
    elif leaf in ("wo_b", "w2"):  # what writes to the streams, 2 * depth times
        deviation *= (2 * depth) ** -0.5
    draw = torch.empty(like.shape)
    nn.init.normal_(draw, std=deviation, generator=generator)
    return draw


def _hash_table(like: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Distinct experts for each token, all experts equally often."""
    rows = torch.rand(like.shape[0], config.n_routed_experts, generator=generator)
    return rows.argsort(dim=-1)[:, : config.num_experts_per_tok]
