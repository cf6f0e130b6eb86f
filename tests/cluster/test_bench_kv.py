import json
import subprocess
import sys
from dataclasses import replace

import pytest

from cluster.bench_kv.budget import Budget, Load
from cluster.bench_kv.report import Report, as_dict, print_tables
from cluster.bench_kv.resume import Resumed, break_even


def resumed(history: int, seconds: float, tier: str = "ram") -> Resumed:
    return Resumed(history, tier, history, seconds, computed_seconds=history * 0.002)


def test_break_even_is_where_resuming_starts_to_win_for_good():
    slow_fast_slow_fast = [resumed(100, 1.0), resumed(200, 0.1), resumed(300, 1.0)]
    assert break_even([*slow_fast_slow_fast, resumed(400, 0.1), resumed(500, 0.1)], "ram") == 400


def test_no_break_even_where_computing_always_wins():
    assert break_even([resumed(100, 1.0), resumed(200, 1.0)], "ram") is None


def test_tiers_are_judged_apart():
    assert break_even([resumed(100, 0.1, "ram"), resumed(100, 1.0, "disk")], "disk") is None


def test_the_report_is_json_and_tables(capsys: pytest.CaptureFixture[str]):
    full = Budget(0.0, 100, None, 0.04, 1.0, 0.2, 0)
    report = Report(
        machine="a machine",
        load=Load(),
        budgets=[full, replace(full, saved=0.4, device_bytes=60, hot_entries=128)],
        resumed=[resumed(100, 0.1)],
    )
    print_tables(report)
    printed = capsys.readouterr().out
    assert "host, 128 hot" in printed
    assert "100 tokens" in printed
    told = json.loads(json.dumps(as_dict(report)))
    assert told["ratios"]["resumed"] == pytest.approx([2.0])
    assert told["break_even_tokens"] == {"ram": 100}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run():
    command = [sys.executable, "-m", "cluster.main", "bench", "kv", "--quick", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["budgets"][0]["saved"] == 0
    assert {each["tier"] for each in found["resumed"]} >= {"ram", "disk"}
    assert not [each for each in found["resumed"] if each["restored_tokens"] < 128]
    assert found["no_reuse"]["num_requests"] == 4
