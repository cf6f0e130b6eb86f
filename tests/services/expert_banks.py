"""Seeded expert banks of a small model, and random calls for them."""

from collections.abc import Sequence

import torch

from model1.config import ModelConfig
from model1.moe import ExpertBank, ExpertCall

NUM_EXPERTS = 8
HIDDEN_SIZE = 64
NUM_LAYERS = 3


def config(
    num_experts: int = NUM_EXPERTS,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = NUM_LAYERS,
    width: int = 32,
    experts_per_row: int = 2,
) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "vocab_size": 64,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "head_dim": 16,
            "qk_rope_head_dim": 8,
            "q_lora_rank": 16,
            "o_groups": 1,
            "o_lora_rank": 16,
            "sliding_window": 8,
            "compress_ratios": [0] * num_layers,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "num_hash_layers": 0,
            "n_routed_experts": num_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": experts_per_row,
            "moe_intermediate_size": width,
            "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 2,
            "hc_eps": 1e-6,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "compress_rope_theta": 10000.0,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
    )


def seeded_bank(
    expert_ids: Sequence[int], dtype: torch.dtype = torch.float32, shape: ModelConfig | None = None
) -> ExpertBank:
    """An expert's weights depend on its id alone, not on who holds it beside which others."""
    bank = ExpertBank(shape or config(), expert_ids, dtype)
    for name, weight in bank.named_parameters():
        layer = int(name.split(".")[1])
        for slot, expert_id in enumerate(bank.expert_ids):
            draw = torch.Generator().manual_seed(1000 * layer + 10 * expert_id + ("w2" in name))
            drawn = torch.randn(weight.shape[1:], generator=draw) * weight.shape[-1] ** -0.5
            weight.data[slot] = drawn.to(dtype)
    return bank


def random_call(
    num_rows: int,
    layer: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shape: ModelConfig | None = None,
) -> ExpertCall:
    shape = shape or config()
    k, draw = shape.num_experts_per_tok, torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_rows, shape.n_routed_experts, generator=draw).topk(k).indices
    return ExpertCall(
        layer=layer,
        rows=torch.randn(num_rows, shape.hidden_size, generator=draw).to(dtype),
        expert_ids=chosen.sort().values.to(torch.int32),
        weights=torch.rand(num_rows, k, generator=draw),
    )
