"""Initial values of every parameter, before training. Knows nothing of data or optimisers."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.modules import AttentionWeights
from model1.moe import ExpertBank
from model1.trunk import Block, Trunk

# Smaller than the paper's mixing would ever need: streams start as four equal, independent copies.
HC_SCALE = 0.01
HC_OFF_DIAGONAL = -6.0
# Of the three fastest rotary pairs, against rows of length 1.
LOOK_BACK_STRENGTHS = (1.2, 0.8, 0.6)
# Queries have length sqrt(d) and scores are divided by it: with d = 64, not 512, keys of that
# length too could not make the softmax sharp.
KEY_GAIN = 2.0
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
    shared = torch.empty(trunk.config.hidden_size)
    nn.init.normal_(shared, std=EMBED_DEVIATION, generator=generator)
    trunk.embed.weight += shared
    blocks = [cast(Block, block) for block in trunk.layers]
    _look_back(blocks[0].attn, shared / shared.norm(), trunk)
    for block in blocks[1:]:
        _match_alike(block.attn, trunk.config)
    # Untied, yet equal in direction: a model that copies a token's embedding then says that token.
    trunk.head.weight.copy_(trunk.embed.weight * (HEAD_DEVIATION / EMBED_DEVIATION))
    for name, table in trunk.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(_hash_table(table, trunk.config, generator))


def _look_back(w: AttentionWeights, shared: Tensor, trunk: Trunk) -> None:
    """Head h of the first layer begins by attending to the token h + 1 places back.

    Only the rotary dimensions tell distances, and nothing in a random model feeds them the same
    vector everywhere. So all embeddings get a `shared` direction `[D]`, which the keys turn into
    one fixed vector and each head's queries into that vector turned back by its distance. Without
    this, 500 steps found no head that looks at the token before, and so no recall.
    """
    config = trunk.config
    first = config.head_dim - config.qk_rope_head_dim
    from_query = w.wq_a.weight @ shared
    from_query /= from_query.norm()
    for pair, strength in enumerate(LOOK_BACK_STRENGTHS):
        w.wkv.weight[first + 2 * pair] += strength * shared
        frequency = trunk.rope.main[pair]
        for head in range(config.num_attention_heads):
            turn = frequency * (head + 1)
            row = head * config.head_dim + first + 2 * pair
            w.wq_b.weight[row] += 3 * strength * turn.cos() * from_query
            w.wq_b.weight[row + 1] -= 3 * strength * turn.sin() * from_query
    # Heads of a group write what they found in the same way, whatever the distance: then "the
    # word before me" and "the word two before me" can be compared.
    first_head, *others = w.wo_a.weight.unflatten(1, (-1, config.head_dim)).unbind(1)
    for other in others:
        other.copy_(first_head)


def _match_alike(w: AttentionWeights, config: ModelConfig) -> None:
    """Half of the heads begin by attending to tokens like their own, queries made as keys are."""
    heads = w.wq_b.weight.unflatten(0, (config.num_attention_heads, config.head_dim))
    alike = heads[0].clone()  # [d, q_lora]
    heads[: config.num_attention_heads // 2] = alike
    keys = alike @ w.wq_a.weight
    w.wkv.weight.copy_(keys / keys.norm(dim=1, keepdim=True))


def _value(
    name: str, like: Tensor, config: ModelConfig, depth: int, generator: torch.Generator
) -> Tensor:
    n = config.hc_mult
    leaf = name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
    if leaf == "kv_norm" or name.endswith("attn.compressor.norm.weight"):
        return torch.full_like(like, KEY_GAIN)
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
