"""The dense twin against transformers, the sparse rule and the gradient of the indexer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model1 import dense
from model1.checkpoint import save_checkpoint
from model1.config import AttentionKind, ModelConfig, YarnConfig
from model1.moe import ExpertBank
from model1.trunk import Trunk

SWA, CSA, HCA = AttentionKind.SWA, AttentionKind.CSA, AttentionKind.HCA
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    sliding_window=8,
    attention_kinds=(SWA, CSA, HCA, CSA),
    csa_ratio=4,
    hca_ratio=128,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=3,
    hash_routed=(True, False, False, False),
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn=YarnConfig(factor=16.0, original_max_position_embeddings=64),
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_ids=(1,),
)


@torch.no_grad()
def random_model(config: ModelConfig, seed: int = 0) -> tuple[Trunk, ExpertBank]:
    """Every parameter drawn, so that no path is zeros and untested."""
    generator = torch.Generator().manual_seed(seed)
    trunk, bank = Trunk(config), ExpertBank(config, range(config.n_routed_experts))
    for module in (trunk, bank):
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            is_vector = parameter.dim() == 1 or name.endswith("ape")
            parameter.copy_(1 + 0.1 * draw if is_norm else draw * (0.5 if is_vector else 0.15))
    for name, table in trunk.named_buffers():
        if name.endswith("tid2eid"):
            rows = torch.rand(table.shape[0], config.n_routed_experts, generator=generator)
            table.copy_(rows.argsort(dim=-1)[:, : config.num_experts_per_tok])
    return trunk, bank


def tokens(shape: tuple[int, ...], config: ModelConfig, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=generator)


@pytest.mark.parametrize("length", [1, 3, 9, 130, 300])
def test_logits_equal_transformers(length: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trunk, bank = random_model(CONFIG)
    save_checkpoint(tmp_path, CONFIG, trunk, bank, torch.float32)
    theirs = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokens((2, length), CONFIG)
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        actual = dense.logits(trunk, bank, ids)
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_later_token_changes_no_earlier_logit() -> None:
    trunk, bank = random_model(CONFIG)
    ids = tokens((1, 150), CONFIG)
    changed = ids.clone()
    changed[0, 140] = (changed[0, 140] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = dense.logits(trunk, bank, ids), dense.logits(trunk, bank, changed)
    assert torch.allclose(before[:, :140], after[:, :140], atol=1e-5)
    assert not torch.allclose(before[:, 140:], after[:, 140:], atol=1e-3)


def test_sparse_equals_dense_when_topk_covers_all_entries() -> None:
    config = replace(CONFIG, index_topk=16)
    trunk, bank = random_model(config)
    ids = tokens((2, 64), config)
    with torch.no_grad():
        sparse = dense.forward(trunk, bank, ids, dense.DenseOptions(sparse=True)).hidden
        full = dense.forward(trunk, bank, ids, dense.DenseOptions(sparse=False)).hidden
    assert torch.equal(sparse, full)


def test_indexer_loss_reaches_the_indexers_and_nothing_else() -> None:
    trunk, bank = random_model(CONFIG)
    options = dense.DenseOptions(sparse=True, indexer_loss=True)
    out = dense.forward(trunk, bank, tokens((2, 65), CONFIG), options)
    out.indexer_loss.backward()
    touched = {name for name, p in trunk.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(".indexer." in name for name in touched)
    assert all(p.grad is None for p in bank.parameters())


def test_every_parameter_but_gate_bias_and_indexer_learns_from_the_logits() -> None:
    trunk, bank = random_model(CONFIG)
    dense.logits(trunk, bank, tokens((2, 140), CONFIG)).square().mean().backward()
    for module in (trunk, bank):
        for name, parameter in module.named_parameters():
            if ".indexer." in name or name.endswith("gate.bias"):
                assert parameter.grad is None, name
            else:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name


def test_loads_count_every_choice() -> None:
    trunk, bank = random_model(CONFIG)
    with torch.no_grad():
        out = dense.forward(trunk, bank, tokens((2, 10), CONFIG))
    assert [int(load.sum()) for load in out.expert_loads] == [2 * 10 * 2] * 4
