"""The dispatch benchmark's own arithmetic, and that all of its parts run."""

import json
import subprocess
import sys

import pytest

from cluster.bench_dispatch.hop import HopCost
from cluster.bench_dispatch.overlap import Gain, StepCost, TakingTurns
from cluster.bench_dispatch.replicas import Throughput
from cluster.bench_dispatch.report import Report, as_dict, print_tables
from cluster.bench_dispatch.rig import CpuSeconds
from services.attention.overlap import MeasuredStep, StepSize
from services.attention.stats import Percentiles

DECODE = StepSize.of(8, 8)


def turns_of(num_steps: int, seconds: dict[int, float]) -> TakingTurns:
    """So many steps of each way; `seconds` of one batch and of two micro-batches."""
    turns = TakingTurns(8)
    for _ in range(3 * num_steps):
        way = turns.choose(DECODE)
        took = seconds[way]
        turns.observe(DECODE, MeasuredStep(8, way, took, 0.5 * took))
    return turns


def test_the_ways_take_turns_and_the_automatic_one_learns_from_its_own_steps() -> None:
    gain = Gain.of(8, turns_of(40, {1: 1.0, 2: 0.8}))
    assert gain.steps == 40
    assert (gain.one, gain.two, gain.automatic) == (1.0, 0.8, 0.8)
    assert gain.two_ratio == pytest.approx(1.25)
    assert 1.15 < gain.automatic_ratio < 1.25  # its first steps were of one batch
    assert gain.automatic_twos > 0.8


def test_where_two_are_slower_the_automatic_way_loses_little() -> None:
    gain = Gain.of(8, turns_of(100, {1: 1.0, 2: 1.4}))
    assert gain.two_ratio == pytest.approx(1 / 1.4)
    assert gain.automatic_ratio > 0.98
    assert 0 < gain.automatic_twos < 0.05


def test_prompts_and_smaller_batches_do_not_count() -> None:
    turns = TakingTurns(8)
    for size, num_tokens in ((StepSize.of(64, 8), 64), (StepSize.of(7, 7), 7)):
        for _ in range(6):
            turns.observe(size, MeasuredStep(num_tokens, turns.choose(size), 1.0, 0.5))
    assert (turns.one, turns.two, turns.automatic) == ([], [], [])


def test_the_report_is_json_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    gain = Gain.of(8, turns_of(10, {1: 0.010, 2: 0.008}))
    cpu = CpuSeconds(worker=0.004, router=0.001, experts=0.003)
    report = Report(
        machine="a machine",
        emulated_bytes_per_second=2e9,
        hops=[
            HopCost(
                num_rows=32,
                num_replicas=2,
                num_bytes=300 * 1024,
                num_trips=10,
                crossing=Percentiles(0.0013, 0.002),
                chain=Percentiles(0.001, 0.0015),
            )
        ],
        gains=[gain],
        costs=[
            StepCost(batch=8, micro_batches=2, seconds=0.008, cpu=cpu, wait_seconds=0.001, cores=2)
        ],
        throughputs=[Throughput(1, 100.0, 1.0), Throughput(2, 190.0, 0.95)],
    )
    print_tables(report)
    printed = capsys.readouterr().out
    assert "1.30x" in printed and "75" in printed  # us a hop
    assert "1.25x" in printed
    assert "50%" in printed
    assert "emulated: 2 GB/s of weights" in printed
    told = json.loads(json.dumps(as_dict(report)))
    assert told["hop_ratios"]["32"] == pytest.approx(1.3)
    assert told["throughputs"][1]["of_linear"] == 0.95


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run() -> None:
    command = [sys.executable, "-m", "cluster.main", "bench", "dispatch", "--quick"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["hops"][0]["chain"]["p50"] > 0
    assert {each["batch"] for each in found["gains"]} == {4}
    assert {each["batch"] for each in found["emulated_gains"]} == {4}
    assert [each["micro_batches"] for each in found["costs"]] == [1, 2]
    assert [each["num_replicas"] for each in found["throughputs"]] == [1, 2, 4]
    assert found["throughputs"][2]["of_linear"] > 0.5
