"""A seeded random model with every layer kind, small enough to generate in milliseconds."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from model1.config import ModelConfig
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVPool
from model1.model import Model
from model1.moe import ExpertBank
from model1.tokenizer import BOS, EOS
from model1.trunk import Trunk

VOCAB_SIZE = 272
CONTEXT = 400
EOS_ID = 1

CONFIG = ModelConfig.from_dict(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 1,
        "o_lora_rank": 16,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 128],
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 4,
        "num_hash_layers": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": EOS_ID,
    }
)


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Model:
    """Drawn so that values neither vanish nor grow from layer to layer."""
    trunk = Trunk(config, dtype, device)
    bank = ExpertBank(config, range(config.n_routed_experts), dtype, device)
    draw = torch.Generator().manual_seed(seed)
    for module in (trunk, bank):
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            values = torch.randn(parameter.shape, generator=draw) * fan_in**-0.5
            if name.endswith("norm.weight"):
                values = 1 + 0.1 * values
            parameter.data.copy_(values)
            parameter.requires_grad_(False)
    for name, buffer in trunk.named_buffers():
        if name.endswith("tid2eid"):
            for token in range(config.vocab_size):
                chosen = torch.randperm(config.n_routed_experts, generator=draw)
                buffer[token] = chosen[: config.num_experts_per_tok]
    return Model(trunk, bank)


@cache
def model(context: int = CONTEXT) -> Model:
    """Shared by all tests of a process: nobody changes weights."""
    return random_model(replace(CONFIG, max_position_embeddings=context), seed=7)


def pool(
    max_sequences: int = 8,
    max_tokens: int = 4096,
    max_step_tokens: int = 64,
    context: int = CONTEXT,
    clock: Callable[[], float] = time.monotonic,
) -> KVPool:
    config = model(context).config
    capacity = PoolCapacity(max_sequences, max_tokens, max_step_tokens)
    return KVPool(config, capacity, clock=clock)


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids of bytes, no special ones."""
    draw = torch.Generator().manual_seed(1000 * seed + num_tokens)
    return tuple(torch.randint(2, 258, (num_tokens,), generator=draw).tolist())


def write_model_dir(directory: Path) -> Path:
    """config.json and tokenizer.json: all that a gateway reads. One token a byte."""
    (directory / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0, EOS: EOS_ID} | {char: 2 + i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    backend.save(str(directory / "tokenizer.json"))
    return directory
