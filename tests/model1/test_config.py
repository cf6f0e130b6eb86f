"""What config.json may say, in both spellings, and how what is wrong with it is told."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model1.config import AttentionKind, ModelConfig, YarnConfig
from model1.errors import ConfigError

SWA, CSA, HCA = AttentionKind.SWA, AttentionKind.CSA, AttentionKind.HCA

# As released (spec section 1.1): keys that the model does not use are there too.
FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "num_hash_layers": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1,
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
PRO = FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
}
SMALL = FLASH | {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]}


def without(raw: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def transformers_spelling(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same model as transformers writes it."""
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    kinds[128] = "heavily_compressed_attention"
    layers, partial = raw["num_hidden_layers"], raw["qk_rope_head_dim"] / raw["head_dim"]
    yarn = {"rope_type": "yarn", "attention_factor": 1.0, "partial_rotary_factor": partial}
    yarn |= without(raw["rope_scaling"], "type")
    return without(
        raw, "compress_ratios", "num_hash_layers", "rope_scaling", "qk_rope_head_dim"
    ) | {
        "layer_types": [kinds[ratio] for ratio in raw["compress_ratios"]][:layers],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * (layers - 3),
        "compress_rates": {kinds[4]: 4, kinds[128]: 128},
        "partial_rotary_factor": partial,
        "eos_token_id": [1],
        "rope_parameters": {
            "main": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": partial,
            },
            "compress": yarn | {"rope_theta": 160000.0},
        },
    }


def test_flash_as_released_has_2_swa_21_csa_and_20_hca_layers() -> None:
    config = ModelConfig.from_dict(FLASH)
    assert config.num_hidden_layers == 43
    assert config.attention_kinds == (SWA, SWA, *(CSA, HCA) * 20, CSA)
    assert [config.attention_kinds.count(kind) for kind in (SWA, CSA, HCA)] == [2, 21, 20]
    assert config.hash_routed == (True,) * 3 + (False,) * 40
    assert config.yarn == YarnConfig(16.0, 65536, 32.0, 1.0)
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)
    assert (config.qk_rope_head_dim, config.csa_ratio, config.hca_ratio) == (64, 4, 128)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))


def test_pro_as_released_has_30_csa_and_31_hca_layers() -> None:
    config = ModelConfig.from_dict(PRO)
    assert config.num_hidden_layers == 61
    assert config.attention_kinds == (HCA, HCA, *(CSA, HCA) * 29, CSA)
    assert [config.attention_kinds.count(kind) for kind in (SWA, CSA, HCA)] == [0, 30, 31]


def test_a_release_with_three_draft_layers_is_the_same_model() -> None:
    drafts = FLASH | {"compress_ratios": [*FLASH["compress_ratios"], 0, 0]}
    assert ModelConfig.from_dict(drafts) == ModelConfig.from_dict(FLASH)


@pytest.mark.parametrize("raw", (FLASH, PRO, SMALL), ids=("flash", "pro", "small"))
def test_both_spellings_give_the_same_config(raw: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(transformers_spelling(raw)) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"rope_scaling": None},
        {"eos_token_id": None},
        {"eos_token_id": [1, 7]},
        {"num_hash_layers": 0},
        {"head_dim": 196, "qk_rope_head_dim": 2, "index_head_dim": 30},
    ),
    ids=str,
)
def test_to_dict_reads_back_to_the_same_config(changes: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(SMALL | changes)
    assert ModelConfig.from_dict(config.to_dict()) == config


@given(head_dim=st.integers(1, 256).map(lambda n: 4 * n), pairs=st.integers(1, 64))
def test_every_rotary_width_survives_being_written_as_a_share(head_dim: int, pairs: int) -> None:
    rotary = min(2 * pairs, head_dim)
    config = replace(
        ModelConfig.from_dict(SMALL),
        head_dim=head_dim,
        qk_rope_head_dim=rotary,
        index_head_dim=max(rotary, 16),
    )
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_ratios_other_than_the_released_ones_come_with_transformers_spelling() -> None:
    raw = transformers_spelling(SMALL)
    raw["compress_rates"] = {str(CSA): 8, str(HCA): 16}
    config = ModelConfig.from_dict(raw)
    assert (config.csa_ratio, config.hca_ratio) == (8, 16)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "q_lora_rank",
        "o_groups",
        "o_lora_rank",
        "sliding_window",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "hc_mult",
        "hc_sinkhorn_iters",
        "max_position_embeddings",
    ],
)
def test_a_size_must_be_there_and_a_positive_whole_number(key: str) -> None:
    assert_refused(without(SMALL, key), key)
    for value in (0, -3, 2.5, "8", True, [4]):
        assert_refused(SMALL | {key: value}, key, value)


@pytest.mark.parametrize(
    "key",
    [
        "routed_scaling_factor",
        "swiglu_limit",
        "hc_eps",
        "rms_norm_eps",
        "rope_theta",
        "compress_rope_theta",
    ],
)
def test_a_factor_must_be_a_positive_number(key: str) -> None:
    wrong: tuple[Any, ...] = (0, -1.5, math.nan, math.inf, "1e-6", True, {})
    for value in wrong:
        assert_refused(SMALL | {key: value}, key, value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "deepseek_v3"}, ["model_type", "deepseek_v3"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob", False]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads", 8]),
        ({"n_shared_experts": 2}, ["n_shared_experts", 2]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", True]),
        ({"attention_bias": True}, ["attention_bias", True]),
        ({"compress_ratios": None}, ["layer_types", "compress_ratios"]),
        ({"compress_ratios": 4}, ["compress_ratios", 4]),
        ({"compress_ratios": [0, 4, 8, 4]}, ["compress_ratios", 8]),
        ({"compress_ratios": [0, 4, [4], 4]}, ["compress_ratios", [4]]),
        ({"compress_ratios": [0, 4]}, [2, 4, "layer"]),
        ({"layer_types": [str(CSA), "linear_attention"]}, ["layer_types", "linear_attention"]),
        ({"layer_types": "hca"}, ["layer_types", "hca"]),
        ({"compress_rates": {"linear_attention": 4}}, ["compress_rates", "linear_attention"]),
        ({"compress_rates": {str(CSA): "4"}}, [str(CSA), "4"]),
        ({"compress_rates": {str(CSA): 0}}, ["csa_ratio", 0]),
        ({"compress_rates": {str(CSA): 5}}, [5, 128]),
        ({"compress_rates": [4, 128]}, ["compress_rates", [4, 128]]),
        ({"mlp_layer_types": ["moe", "dense", "moe", "moe"]}, ["mlp_layer_types", "dense"]),
        ({"mlp_layer_types": ["moe"]}, [1, 4, "MoE"]),
        ({"num_hash_layers": "3"}, ["num_hash_layers", "3"]),
        ({"qk_rope_head_dim": None}, ["qk_rope_head_dim", "partial_rotary_factor"]),
        (
            {"qk_rope_head_dim": None, "partial_rotary_factor": "half"},
            ["partial_rotary_factor", "half"],
        ),
        ({"qk_rope_head_dim": 63}, ["qk_rope_head_dim", 63]),
        ({"qk_rope_head_dim": 130}, ["qk_rope_head_dim", 130, 128]),
        ({"rope_scaling": {"type": "linear"}}, ["rope type", "linear"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor"]),
        (
            {"rope_scaling": {"type": "yarn", "factor": 16}},
            ["original_max_position_embeddings"],
        ),
        ({"rope_scaling": FLASH["rope_scaling"] | {"factor": 0}}, ["factor", 0]),
        ({"rope_scaling": FLASH["rope_scaling"] | {"factor": "16"}}, ["factor", "16"]),
        ({"rope_scaling": FLASH["rope_scaling"] | {"beta_slow": -1}}, ["beta_slow", -1]),
        (
            {"rope_scaling": FLASH["rope_scaling"] | {"attention_factor": 1.2}},
            ["attention_factor", 1.2],
        ),
        ({"rope_theta": 1.0}, ["rope_theta", 1.0]),
        ({"sliding_window": 127}, ["sliding_window", 127]),
        ({"o_groups": 7}, ["num_attention_heads", 64, "o_groups", 7]),
        ({"num_experts_per_tok": 257}, ["num_experts_per_tok", 257, "n_routed_experts", 256]),
        ({"hc_mult": 1}, ["hc_mult", 1]),
        ({"hc_mult": 5}, ["hc_mult", 5]),
        ({"head_dim": 510}, ["head_dim", 510]),
        ({"bos_token_id": "<s>"}, ["bos_token_id", "<s>"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"eos_token_id": [1, None]}, ["eos_token_id", None]),
    ],
    ids=str,
)
def test_an_error_names_the_key_and_the_value(changes: dict[str, Any], told: list[Any]) -> None:
    assert_refused(SMALL | changes, *told)


def test_a_built_config_must_have_as_many_moe_layers_as_attention_layers() -> None:
    with pytest.raises(ConfigError, match="4 attention layers, 1 MoE"):
        replace(ModelConfig.from_dict(SMALL), hash_routed=(True,))


def assert_refused(raw: Mapping[str, Any], *told: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    for value in told:
        assert str(value) in str(caught.value)
