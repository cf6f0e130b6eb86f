"""Random models to test KV state with: several layers of each kind, so that a mix-up shows."""

from dataclasses import replace
from functools import cache

import torch

from model1.config import AttentionKind
from model1.model import Model
from model1.moe import ExpertBank
from model1.trunk import Trunk
from tests.services import tiny_model

SWA, CSA, HCA = AttentionKind.SWA, AttentionKind.CSA, AttentionKind.HCA
CONFIG = replace(
    tiny_model.CONFIG,
    attention_kinds=(CSA, SWA, HCA, CSA, HCA, SWA),
    hash_routed=(True, *[False] * 5),
    eos_token_ids=(),
    max_position_embeddings=1024,
)


@cache
def model_of(window: int, dtype: torch.dtype, index_topk: int = CONFIG.index_topk) -> Model:
    config = replace(CONFIG, sliding_window=window, index_topk=index_topk)
    trunk, bank = Trunk(config, dtype), ExpertBank(config, range(config.n_routed_experts), dtype)
    draw = torch.Generator().manual_seed(11)
    for module in (trunk, bank):
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            values = torch.randn(parameter.shape, generator=draw) * fan_in**-0.5
            parameter.data.copy_(1 + 0.1 * values if name.endswith("norm.weight") else values)
            parameter.requires_grad_(False)
    hashed = trunk.get_buffer("layers.0.ffn.gate.tid2eid")
    hashed.copy_(torch.arange(hashed.numel()).view(hashed.shape) % config.n_routed_experts)
    return Model(trunk, bank)
