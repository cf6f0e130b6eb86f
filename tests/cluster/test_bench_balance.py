"""The balance benchmark: its arithmetic, and the whole of it on a small scale."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.bench_balance.bench import Plan, measure, split_gaps
from cluster.bench_balance.report import as_dict
from cluster.bench_balance.windows import Balanced, Counted, balances, seconds_until_kept
from cluster.bench_balance.zipf import DriftingExperts
from cluster.chaos.traffic import Exchange
from cluster.expert_shift import Shift
from model1 import shipped_model_dir
from model1.bench import MINI, write_random_checkpoint

# The mini model's experts and their number, the rest as small as it can be.
SMALL = replace(
    MINI,
    hidden_size=64,
    num_attention_heads=2,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_lora_rank=32,
    attention_kinds=MINI.attention_kinds[:4],
    hash_routed=MINI.hash_routed[:4],
    index_n_heads=2,
    index_head_dim=64,
    moe_intermediate_size=32,
)


def test_rows_have_different_experts_in_ascending_order_and_the_hot_ones_more_often() -> None:
    drawn = DriftingExperts(32, 4, 1.2, seed=1)
    ids = drawn.draw(2000)
    assert ids.shape == (2000, 4)
    assert ids.dtype == np.int32
    assert (np.diff(ids, axis=1) > 0).all()
    share = drawn.share_of_rows()
    assert share.sum() == pytest.approx(4)
    assert share.max() < 1
    assert np.sort(share)[-8:].sum() > 2.5


def test_after_a_drift_the_hot_experts_are_others() -> None:
    drawn = DriftingExperts(32, 4, 1.2, seed=1)
    before = np.argsort(-drawn.share_of_rows())[: drawn.num_hot]
    drawn.drift()
    after = np.argsort(-drawn.share_of_rows())[: drawn.num_hot]
    assert len(before) == 8
    assert len(set(before.tolist()) & set(after.tolist())) <= 2  # but for noise at the edge


def test_a_balance_is_that_of_one_window() -> None:
    readings = [Counted(float(t), {"a": 100 * t, "b": 50 * t, "new": t}) for t in range(4)]
    readings += [Counted(float(t), {"a": 100 * t, "b": 50 * t + 300}) for t in range(4, 11)]
    found = balances(readings)
    assert [each.at for each in found] == [5, 6, 7, 8, 9, 10]
    assert found[0].balance == pytest.approx(525 / 550)  # a got 500, b 550
    assert found[-1].balance == pytest.approx(375 / 500)


def test_a_balance_counts_from_when_it_is_kept() -> None:
    values = [0.5, 0.95, 0.4, *([0.93] * 12)]
    since = [Balanced(100.0 + t, value) for t, value in enumerate(values)]
    assert seconds_until_kept(since, 99.0, 0.9) == 4.0
    assert seconds_until_kept(since[:12], 99.0, 0.9) is None


def test_gaps_are_those_with_moves_those_of_like_times_without_and_all_without() -> None:
    exchange = Exchange(0, started=0.0, arrivals=[0.5, 1.5, 2.0, 3.5, 6.0, 7.0, 9.0, 10.0])
    shifts = [Shift(1.8, 2.2, 4)]  # and 4.3 to 4.7
    assert split_gaps([exchange], shifts, 1.0, 9.5) == ([0.5, 1.5], [2.5], [2.5, 1.0, 2.0])
    shifts.append(Shift(4.5, 4.6, 1))  # no quiet time, then; and 7.0 to 7.1
    assert split_gaps([exchange], shifts, 1.0, 9.5) == ([0.5, 1.5, 2.5], [2.0], [1.0, 2.0])
    prompt = Exchange(1, started=6.5, arrivals=[6.8])
    assert split_gaps([exchange, prompt], shifts, 1.0, 9.5) == ([0.5, 1.5, 2.5], [2.0], [2.0])


@pytest.mark.slow  # a deployment of eight processes under load
@pytest.mark.timeout(300)
# Ray's own processes, on a machine so busy that they outlive its shutdown by a moment.
@pytest.mark.filterwarnings("ignore:.*Popen.__del__:pytest.PytestUnraisableExceptionWarning")
def test_experts_move_under_a_skewed_load_and_no_token_changes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL)
    shutil.copy(shipped_model_dir() / "tokenizer.json", tmp_path)
    plan = Plan(
        drifts=2, every_seconds=25.0, replicas=4, streams=1, crossings_per_second=10.0, seed=5
    )
    report = measure(tmp_path, plan)
    assert report.wrong == report.failed == ()
    assert report.num_answers > 0
    assert report.num_crossings > 0
    assert report.gaps_still.count > report.gaps_moving.count
    assert sum(drift.num_moves for drift in report.drifts) > 0
    assert all(drift.bound == 1.0 for drift in report.drifts)
    assert report.drifts[0].settled_balance > 0.8
    assert json.loads(json.dumps(as_dict(report)))["seed"] == 5
