"""What `model1 train --preset NAME` trains: model shape, schedule and mixture, in frozen values."""

import math
from dataclasses import dataclass
from typing import Final

from model1.config import AttentionKind, ModelConfig, YarnConfig
from model1.train.tokenize import VOCAB_SIZE

_SWA, _CSA, _HCA = AttentionKind.SWA, AttentionKind.CSA, AttentionKind.HCA


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training. Phases grow in length and difficulty."""

    share: float  # of all steps
    sequence_tokens: int
    recall_share: float
    max_keys: int
    sparse: bool  # CSA layers see the indexer's choice only
    indexer_loss: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    name: str
    config: ModelConfig
    phases: tuple[Phase, ...]
    steps: int
    batch_tokens: int
    warmup_steps: int
    learning_rate: float
    final_learning_rate: float
    weight_decay: float
    seed: int


NANO_CONFIG: Final = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=96,
    o_groups=2,
    o_lora_rank=64,
    sliding_window=64,
    attention_kinds=(_SWA, _CSA, _HCA, _CSA, _HCA, _CSA),
    csa_ratio=4,
    hca_ratio=128,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=32,
    hash_routed=(True, False, False, False, False, False),
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=56,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn=YarnConfig(factor=8.0, original_max_position_embeddings=512),
    max_position_embeddings=4096,
    bos_token_id=0,
    eos_token_ids=(1,),
)

# Recall first, alone and short: there it appears within 150 steps; beside stories 500 were not
# enough. Then mixed and longer, with all entries in view while the indexer learns to choose; then
# sparse, as it will serve.
NANO: Final = Preset(
    name="nano",
    config=NANO_CONFIG,
    phases=(
        Phase(
            share=0.22,
            sequence_tokens=64,
            recall_share=1.0,
            max_keys=4,
            sparse=False,
            indexer_loss=False,
        ),
        Phase(
            share=0.4,
            sequence_tokens=128,
            recall_share=0.4,
            max_keys=8,
            sparse=False,
            indexer_loss=False,
        ),
        Phase(
            share=0.16,
            sequence_tokens=256,
            recall_share=0.4,
            max_keys=16,
            sparse=False,
            indexer_loss=True,
        ),
        Phase(
            share=0.22,
            sequence_tokens=512,
            recall_share=0.4,
            max_keys=32,
            sparse=True,
            indexer_loss=True,
        ),
    ),
    steps=800,
    batch_tokens=2_048,
    warmup_steps=20,
    learning_rate=3e-3,
    final_learning_rate=1e-4,
    weight_decay=0.05,
    seed=1,
)

PRESETS: Final = {NANO.name: NANO}


def phase_at(preset: Preset, step: int, steps: int) -> Phase:
    """The phase that step `step` of `steps` belongs to."""
    end = 0.0
    for phase in preset.phases:
        end += phase.share * steps
        if step < end:
            return phase
    return preset.phases[-1]


def learning_rate_at(preset: Preset, step: int, steps: int) -> float:
    """Warmup, then constant for 60 % of the steps (recall appears at a high rate), then cosine."""
    if step < preset.warmup_steps:
        return preset.learning_rate * (step + 1) / preset.warmup_steps
    decay_start = 0.6 * steps
    done = max(0.0, (step - decay_start) / (steps - decay_start))
    low, high = preset.final_learning_rate, preset.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
