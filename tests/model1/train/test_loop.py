"""A cut-off run goes on where it stopped, and the result is a checkpoint others can read."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from model1 import dense, shipped_model_dir
from model1.checkpoint import load_config, load_experts, load_trunk
from model1.errors import InvalidRequest
from model1.train import card
from model1.train.loop import TrainingRun, train
from model1.train.presets import NANO, Phase, learning_rate_at, phase_at
from model1.train.tokenize import save_tokenizer

TINY = replace(
    NANO,
    name="tiny",
    config=replace(
        NANO.config,
        hidden_size=32,
        q_lora_rank=16,
        o_lora_rank=8,
        index_n_heads=2,
        moe_intermediate_size=8,
        n_routed_experts=4,
        hc_sinkhorn_iters=3,
        attention_kinds=NANO.config.attention_kinds[:3],
        hash_routed=NANO.config.hash_routed[:3],
        index_topk=4,
    ),
    phases=(
        Phase(
            share=0.5,
            sequence_tokens=32,
            recall_share=0.5,
            max_keys=4,
            sparse=False,
            indexer_loss=False,
        ),
        Phase(
            share=0.5,
            sequence_tokens=64,
            recall_share=0.5,
            max_keys=4,
            sparse=True,
            indexer_loss=True,
        ),
    ),
    batch_tokens=64,
    warmup_steps=1,
)
STEPS = 4


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shipped_model_dir() / "tokenizer.json"))


def silent(line: str) -> None:
    del line


def new_run(tokenizer: tokenizers.Tokenizer, out_dir: Path) -> TrainingRun:
    return TrainingRun(TINY, tokenizer, out_dir, torch.device("cpu"), STEPS)


def test_a_resumed_run_ends_with_the_same_bits(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = new_run(tokenizer, tmp_path / "whole")
    whole.run_until(STEPS, silent)
    new_run(tokenizer, tmp_path / "cut").run_until(3, silent)
    resumed = new_run(tokenizer, tmp_path / "cut")
    resumed.restore()
    resumed.run_until(STEPS, silent)

    assert [row.loss for row in resumed.log] == [row.loss for row in whole.log]
    for name, value in whole.trunk.state_dict().items():
        assert torch.equal(value, resumed.trunk.state_dict()[name]), name
    for name, value in whole.bank.state_dict().items():
        assert torch.equal(value, resumed.bank.state_dict()[name]), name


@pytest.mark.slow
def test_publishing_writes_a_checkpoint_of_the_rounded_parameters(
    tokenizer: tokenizers.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "NUM_PROBES", 2)
    monkeypatch.setattr(card, "NUM_HELD_OUT_BATCHES", 1)
    run = new_run(tokenizer, tmp_path)
    run.run_until(STEPS, silent)
    save_tokenizer(tokenizer, tmp_path)
    card.publish(run.trunk, run.bank, tokenizer, run.summary(), tmp_path, silent)

    assert load_config(tmp_path) == TINY.config
    trunk = load_trunk(tmp_path, torch.float32, "cpu")
    bank = load_experts(tmp_path, range(4), torch.float32, "cpu")
    assert torch.equal(trunk.embed.weight, run.trunk.embed.weight.bfloat16().float())
    assert dense.logits(trunk, bank, torch.zeros(1, 5, dtype=torch.int64)).isfinite().all()
    text = (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"{STEPS} steps" in text
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == STEPS + 1
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")


def test_resuming_nothing_and_an_unknown_preset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="giant"):
        train("giant", tmp_path)
    run = TrainingRun(
        TINY, tokenizers.Tokenizer(tokenizers.models.BPE()), tmp_path, torch.device("cpu"), STEPS
    )
    with pytest.raises(InvalidRequest, match="nothing to resume"):
        run.restore()


def test_the_schedule_covers_every_step_and_rises_then_falls() -> None:
    steps = NANO.steps
    assert phase_at(NANO, 0, steps) is NANO.phases[0]
    assert phase_at(NANO, steps - 1, steps) is NANO.phases[-1]
    rates = [learning_rate_at(NANO, step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(NANO.final_learning_rate, rel=0.01)
