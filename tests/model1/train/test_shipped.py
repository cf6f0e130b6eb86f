"""The checkpoint in the package: small enough, readable by transformers, and it learned."""

import pytest
import tokenizers
import torch

from model1 import dense, shipped_model_dir
from model1.checkpoint import load_config, load_experts, load_trunk
from model1.moe import ExpertBank
from model1.train import corpus, evaluate
from model1.train.presets import NANO_CONFIG
from model1.trunk import Trunk

MAX_SHIPPED_BYTES = 10_000_000
PROMPT = "Once upon a time, Anna and Ben lived in a small house by the sea."


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shipped_model_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> tuple[Trunk, ExpertBank]:
    directory = shipped_model_dir()
    experts = range(NANO_CONFIG.n_routed_experts)
    return (
        load_trunk(directory, torch.float32, "cpu"),
        load_experts(directory, experts, torch.float32, "cpu"),
    )


def test_the_shipped_directory_is_complete_and_within_its_size() -> None:
    sizes = {path.name: path.stat().st_size for path in shipped_model_dir().iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md", "loss.csv"}
    assert wanted <= set(sizes)
    assert sum(sizes.values()) <= MAX_SHIPPED_BYTES
    assert load_config(shipped_model_dir()) == NANO_CONFIG


def test_transformers_reads_it_and_computes_the_same(
    model: tuple[Trunk, ExpertBank], tokenizer: tokenizers.Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV4ForCausalLM.from_pretrained(
        shipped_model_dir(), dtype=torch.float32
    )
    ids = torch.tensor([[0, *tokenizer.encode(PROMPT * 12).ids]])  # more entries than topk
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        actual = dense.logits(*model, ids)
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_it_recalls_what_a_short_list_said(
    model: tuple[Trunk, ExpertBank], tokenizer: tokenizers.Tokenizer
) -> None:
    assert evaluate.recall_accuracy(*model, tokenizer, 4, 32) > 0.5


def test_it_knows_its_facts(
    model: tuple[Trunk, ExpertBank], tokenizer: tokenizers.Tokenizer
) -> None:
    probes = [corpus.fact_probe(seed) for seed in range(32)]
    assert evaluate.probe_accuracy(*model, tokenizer, probes) > 0.5
