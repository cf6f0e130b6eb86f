"""Random checkpoints of transformers' DeepseekV4ForCausalLM: the implementation not ours.

Each case stresses one part of the architecture, at sizes that run in milliseconds. What
transformers initialises to 0 or 1 (sinks, biases, hash tables, norms) is drawn at random too,
and the experts' inputs are large enough to reach the SwiGLU clamp: else those paths are untested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers  # which imports a model when it is used, so that it costs nobody else
from torch import Tensor, nn

_YARN = {
    "rope_type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
# 16 index heads: with few, ReLU makes many scores exactly 0 and transformers breaks the ties in
# no defined order (trap T16).
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 3,
    "num_hash_layers": 1,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One configuration: what it changes of the small one, and the lengths worth running."""

    name: str
    changes: dict[str, Any]
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def config(self) -> transformers.DeepseekV4Config:
        settings = _SMALL | self.changes
        layers = settings.get("compress_ratios") or settings["layer_types"]
        # No end-of-text token: greedy runs are compared over their whole length.
        return transformers.DeepseekV4Config(
            **settings, num_hidden_layers=len(layers), eos_token_id=None, pad_token_id=0
        )


_SWA, _CSA, _HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
CASES = (
    Case(
        "every_kind_yarn_hash",
        {"compress_ratios": [0, 4, 128, 4], "rope_scaling": _YARN},
        (1, 3, 4, 5, 7, 8, 127, 128, 129, 257, 300),
    ),
    Case(
        "pro_schedule",  # no sliding-window layer, three hash layers, real window
        {
            "compress_ratios": [128, 128, 4, 128, 4],
            "rope_scaling": _YARN,
            "num_hash_layers": 3,
            "sliding_window": 128,
            "index_topk": 8,
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
        },
        (1, 5, 127, 129, 391),
    ),
    Case(
        "short_hca_ratio",  # many HCA windows; CSA ratio other than 4; no YaRN, no hash layer
        {
            "layer_types": [_HCA, _CSA, _SWA, _HCA],
            "compress_rates": {_CSA: 8, _HCA: 16},
            "num_hash_layers": 0,
            "index_n_heads": 32,
            "index_topk": 2,
        },
        (1, 2, 15, 16, 17, 33, 130, 255),
    ),
    Case(
        "sliding_window_only",
        {
            "compress_ratios": [0, 0, 0],
            "sliding_window": 6,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "n_routed_experts": 16,
            "num_experts_per_tok": 6,
            "routed_scaling_factor": 2.5,
        },
        (1, 2, 6, 7, 13, 101),
    ),
    Case(
        "topk_covers_all",  # never a choice to make: few index heads are safe
        {
            "compress_ratios": [4, 4, 128],
            "rope_scaling": _YARN,
            "index_n_heads": 2,
            "index_topk": 512,
            "o_groups": 4,
        },
        (1, 4, 9, 128, 263),
    ),
    Case(
        "real_head_sizes",  # 512-wide heads with 64 rotary, index keys of 128, as released
        {
            "compress_ratios": [0, 4, 128],
            "rope_scaling": _YARN | {"original_max_position_embeddings": 65536},
            "head_dim": 512,
            "qk_rope_head_dim": 64,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 16,
            "sliding_window": 128,
            "max_position_embeddings": 1048576,
        },
        (1, 3, 128, 259),
    ),
    Case(
        "all_hash_three_streams",
        {
            "compress_ratios": [4, 128, 4],
            "num_hash_layers": 3,
            "hc_mult": 3,
            "index_topk": 5,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
        },
        (1, 5, 11, 129, 600),  # longer than one of our prefill chunks
    ),
)


def build(case: Case, directory: Path, seed: int = 0) -> transformers.DeepseekV4ForCausalLM:
    """Save a random float32 checkpoint of the case to `directory`; returns transformers' model."""
    model = random_model(case, seed)
    model.save_pretrained(directory)
    return model


def random_model(case: Case, seed: int = 0) -> transformers.DeepseekV4ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.DeepseekV4ForCausalLM(case.config()).eval().float()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                _randomise(name, tensor, model.config)
    return model


def token_ids(case: Case, length: int, seed: int = 0) -> list[int]:
    """The first `length` tokens of the case's prompt: a shorter one is a prefix of a longer."""
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab: int = case.config().vocab_size
    return torch.randint(vocab, (case.longest,), generator=generator)[:length].tolist()


@torch.no_grad()
def logits(model: transformers.DeepseekV4ForCausalLM, ids: list[int]) -> Tensor:
    """`[T, vocab]` float32 from one uncached forward pass."""
    device = model.lm_head.weight.device
    out: Tensor = model(torch.tensor([ids], device=device), use_cache=False).logits[0]
    return out


@torch.no_grad()
def greedy(model: transformers.DeepseekV4ForCausalLM, ids: list[int], max_tokens: int) -> list[int]:
    """New tokens of transformers' own `generate`."""
    prompt = torch.tensor([ids], device=model.lm_head.weight.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


@contextmanager
def recorded(module: nn.Module, suffix: str) -> Iterator[dict[str, Tensor]]:
    """Outputs of the submodules whose name ends so, by name, of the passes run meanwhile."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _args, out: outputs.__setitem__(name, out)

    hooks = [
        child.register_forward_hook(keep(name))
        for name, child in module.named_modules()
        if name.endswith(suffix)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _randomise(name: str, tensor: Tensor, config: transformers.DeepseekV4Config) -> None:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "tid2eid":
        order = torch.rand(tensor.shape[0], config.n_routed_experts).argsort(dim=-1)
        tensor.copy_(order[:, : tensor.shape[1]])
    elif "norm" in name:
        tensor.normal_(1.0, 0.2)
    elif leaf in ("scale", "hc_scale"):
        tensor.normal_(1.0, 0.3)
    elif leaf in ("sinks", "position_bias", "base", "hc_base"):
        tensor.normal_(0.0, 0.5)
    elif leaf == "e_score_correction_bias":
        tensor.normal_(0.0, 0.3)
    elif "embed_tokens" in name:
        tensor.normal_(0.0, 1.0)
    else:
        # Experts' gate and up reach +-10 on about one value in a hundred.
        in_clamp = "gate_up_proj" in name or ("mlp.shared" in name and "down" not in name)
        tensor.normal_(0.0, (4.0 if in_clamp else 1.2) / tensor.shape[-1] ** 0.5)
        if "down_proj" in name:
            tensor.mul_(0.2)
