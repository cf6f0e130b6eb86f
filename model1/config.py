"""What a MODEL1 checkpoint says about its shape, in one frozen value.

Reads both spellings of config.json: DeepSeek's (`compress_ratios`, `num_hash_layers`,
`rope_scaling`) and transformers' (`layer_types`, `mlp_layer_types`, `rope_parameters`).
Knows nothing of tensors, devices or files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from model1.errors import ConfigError


class AttentionKind(StrEnum):
    """Which keys a layer sees besides its sliding window (values: transformers' names)."""

    SWA = "sliding_attention"  # none
    CSA = "compressed_sparse_attention"  # the indexer's top-k of entries of 4 tokens
    HCA = "heavily_compressed_attention"  # every entry of 128 tokens


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN on the rotary tables of CSA and HCA layers (no attention factor: trap T6)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_positive(f"YaRN {field.name}", getattr(self, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the model. Field names follow DeepSeek's config.json."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    attention_kinds: tuple[AttentionKind, ...]
    csa_ratio: int
    hca_ratio: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hash_routed: tuple[bool, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and field.name != "bos_token_id":
                _require_positive(field.name, value)
        if len(self.attention_kinds) != len(self.hash_routed):
            raise ConfigError(
                f"{len(self.attention_kinds)} attention layers, {len(self.hash_routed)} MoE layers"
            )
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"o_groups {self.o_groups}"
            )
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > min(
            self.head_dim, self.index_head_dim
        ):
            raise ConfigError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} must be even and at most head_dim "
                f"{self.head_dim} and index_head_dim {self.index_head_dim}"
            )
        # Shapes that nobody ships, in which torch's products and numpy's sums round a row by what
        # stands beside it (design rule 3).
        if not 2 <= self.hc_mult <= 4:
            raise ConfigError(f"hc_mult must be between 2 and 4, not {self.hc_mult}")
        if self.head_dim % 4:
            raise ConfigError(f"head_dim must be a multiple of 4, not {self.head_dim}")
        for key in ("rope_theta", "compress_rope_theta"):
            if getattr(self, key) <= 1.0:
                raise ConfigError(f"{key} must be above 1, not {getattr(self, key)}")
        if self.sliding_window % 2:
            raise ConfigError(f"sliding_window must be even, not {self.sliding_window}")
        if self.hca_ratio % self.csa_ratio:
            raise ConfigError(
                f"the HCA ratio {self.hca_ratio} is not a multiple of the CSA ratio "
                f"{self.csa_ratio}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"n_routed_experts {self.n_routed_experts}"
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.attention_kinds)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Build from a parsed config.json of either spelling.

        Raises `ConfigError` naming the key that is missing or wrong.
        """
        kinds, rates = _attention_schedule(raw)
        num_layers = len(kinds)
        rope_theta, compress_theta, yarn = _rope(raw)
        _refuse_other_variants(raw)
        head_dim = _int(raw, "head_dim")
        return cls(
            vocab_size=_int(raw, "vocab_size"),
            hidden_size=_int(raw, "hidden_size"),
            num_attention_heads=_int(raw, "num_attention_heads"),
            head_dim=head_dim,
            qk_rope_head_dim=_rope_head_dim(raw, head_dim),
            q_lora_rank=_int(raw, "q_lora_rank"),
            o_groups=_int(raw, "o_groups"),
            o_lora_rank=_int(raw, "o_lora_rank"),
            sliding_window=_int(raw, "sliding_window"),
            attention_kinds=kinds,
            csa_ratio=rates[AttentionKind.CSA],
            hca_ratio=rates[AttentionKind.HCA],
            index_n_heads=_int(raw, "index_n_heads"),
            index_head_dim=_int(raw, "index_head_dim"),
            index_topk=_int(raw, "index_topk"),
            hash_routed=_hash_schedule(raw, num_layers),
            n_routed_experts=_int(raw, "n_routed_experts"),
            num_experts_per_tok=_int(raw, "num_experts_per_tok"),
            moe_intermediate_size=_int(raw, "moe_intermediate_size"),
            routed_scaling_factor=_number(raw, "routed_scaling_factor", 1.0),
            swiglu_limit=_number(raw, "swiglu_limit", 10.0),
            hc_mult=_int(raw, "hc_mult"),
            hc_sinkhorn_iters=_int(raw, "hc_sinkhorn_iters"),
            hc_eps=_number(raw, "hc_eps", 1e-6),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            compress_rope_theta=compress_theta,
            yarn=yarn,
            max_position_embeddings=_int(raw, "max_position_embeddings"),
            bos_token_id=_int(raw, "bos_token_id", 0),
            eos_token_ids=_eos_token_ids(raw),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json that transformers' DeepseekV4Config reads back to the same model."""
        partial = self.qk_rope_head_dim / self.head_dim
        compress: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": self.compress_rope_theta,
            "partial_rotary_factor": partial,
        }
        if self.yarn is not None:
            compress |= {
                "rope_type": "yarn",
                "attention_factor": 1.0,
                "factor": self.yarn.factor,
                "original_max_position_embeddings": self.yarn.original_max_position_embeddings,
                "beta_fast": self.yarn.beta_fast,
                "beta_slow": self.yarn.beta_slow,
            }
        main = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": partial,
        }
        direct = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _TRANSLATED_FIELDS
        }
        return direct | {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": 1,
            "n_shared_experts": 1,
            "hidden_act": "silu",
            "scoring_func": "sqrtsoftplus",
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "layer_types": [str(kind) for kind in self.attention_kinds],
            "compress_rates": {
                str(AttentionKind.CSA): self.csa_ratio,
                str(AttentionKind.HCA): self.hca_ratio,
            },
            "mlp_layer_types": ["hash_moe" if hashed else "moe" for hashed in self.hash_routed],
            "partial_rotary_factor": partial,
            "rope_parameters": {"main": main, "compress": compress},
            "num_nextn_predict_layers": 0,
            "eos_token_id": list(self.eos_token_ids) or None,
        }


_TRANSLATED_FIELDS = {
    "attention_kinds",
    "hash_routed",
    "csa_ratio",
    "hca_ratio",
    "yarn",
    "eos_token_ids",
    "qk_rope_head_dim",
}


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive, not {value}")


def _int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"config.json has no {key!r}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json: {key} must be a whole number, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"config.json has no {key!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)


def _list(raw: Mapping[str, Any], key: str) -> Sequence[Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, list | tuple):
        raise ConfigError(f"config.json: {key} must be a list, not {value!r}")
    return value


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object, not {value!r}")
    return value or {}


def _eos_token_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """One id, a list of them, or null: a model that never ends on its own."""
    value = raw.get("eos_token_id", 1)
    if value is None:
        return ()
    tokens = tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise ConfigError(f"config.json: eos_token_id must be token ids, not {value!r}")
    return tokens


def _refuse_other_variants(raw: Mapping[str, Any]) -> None:
    """Say so at once where a checkpoint needs arithmetic that this model does not have."""
    supported = {
        "model_type": "deepseek_v4",
        "scoring_func": "sqrtsoftplus",
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    for key, wanted in supported.items():
        if raw.get(key, wanted) != wanted:
            raise ConfigError(f"config.json: {key} is {raw[key]!r}, only {wanted!r} is supported")


def _rope_head_dim(raw: Mapping[str, Any], head_dim: int) -> int:
    if raw.get("qk_rope_head_dim") is not None:
        return _int(raw, "qk_rope_head_dim")
    if raw.get("partial_rotary_factor") is None:
        raise ConfigError("config.json has neither 'qk_rope_head_dim' nor 'partial_rotary_factor'")
    return round(head_dim * _number(raw, "partial_rotary_factor"))


def _attention_schedule(
    raw: Mapping[str, Any],
) -> tuple[tuple[AttentionKind, ...], dict[AttentionKind, int]]:
    num_layers = _int(raw, "num_hidden_layers")
    if num_layers < 1:
        raise ConfigError(f"num_hidden_layers must be positive, not {num_layers}")
    given = _section(raw, "compress_rates")
    rates = {AttentionKind.CSA: 4, AttentionKind.HCA: 128}
    if unknown := [kind for kind in given if kind not in list(rates)]:
        raise ConfigError(f"config.json: compress_rates has {unknown[0]!r}, expected {list(rates)}")
    rates |= {kind: _int(given, kind, rate) for kind, rate in rates.items()}
    types, ratios = _list(raw, "layer_types"), _list(raw, "compress_ratios")
    if types is not None:
        known = [str(kind) for kind in AttentionKind]
        if unknown := [t for t in types if t not in known]:
            raise ConfigError(f"config.json: layer_types has {unknown[0]!r}, expected {known}")
        kinds = tuple(AttentionKind(t) for t in types)
    elif ratios is not None:
        by_ratio = {0: AttentionKind.SWA, 4: AttentionKind.CSA, 128: AttentionKind.HCA}
        if bad := [r for r in ratios if r not in list(by_ratio)]:
            raise ConfigError(f"config.json: compress_ratios has {bad[0]!r}, expected 0, 4 or 128")
        kinds = tuple(by_ratio[r] for r in ratios)
    else:
        raise ConfigError("config.json has neither 'layer_types' nor 'compress_ratios'")
    # The releases list their draft layers too (44 and 62 entries for 43 and 61 layers: trap T26).
    if len(kinds) < num_layers:
        raise ConfigError(f"config.json lists {len(kinds)} layer kinds for {num_layers} layers")
    return kinds[:num_layers], rates


def _hash_schedule(raw: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    types = _list(raw, "mlp_layer_types")
    if types is None:
        num_hash = _int(raw, "num_hash_layers", 3)
        return tuple(layer < num_hash for layer in range(num_layers))
    if bad := [t for t in types if t not in ("hash_moe", "moe")]:
        raise ConfigError(f"config.json: mlp_layer_types has {bad[0]!r}, expected hash_moe or moe")
    if len(types) < num_layers:
        raise ConfigError(f"config.json lists {len(types)} MoE kinds for {num_layers} layers")
    return tuple(t == "hash_moe" for t in types[:num_layers])


def _rope(raw: Mapping[str, Any]) -> tuple[float, float, YarnConfig | None]:
    nested = _section(raw, "rope_parameters")
    main, own = _section(nested, "main"), _section(nested, "compress")
    compress = own or _section(raw, "rope_scaling") or nested
    theta = _number(main, "rope_theta", _number(raw, "rope_theta", 10000.0))
    compress_theta = _number(own, "rope_theta", _number(raw, "compress_rope_theta", 160000.0))
    kind = compress.get("rope_type", compress.get("type", "default"))
    if kind == "default":
        return theta, compress_theta, None
    if kind != "yarn":
        raise ConfigError(f"config.json: rope type {kind!r} is not supported, only yarn")
    if (factor := _number(compress, "attention_factor", 1.0)) != 1.0:
        raise ConfigError(f"config.json: attention_factor must be 1.0 in MODEL1, not {factor}")
    yarn = YarnConfig(
        factor=_number(compress, "factor"),
        original_max_position_embeddings=_int(compress, "original_max_position_embeddings"),
        beta_fast=_number(compress, "beta_fast", 32.0),
        beta_slow=_number(compress, "beta_slow", 1.0),
    )
    return theta, compress_theta, yarn
