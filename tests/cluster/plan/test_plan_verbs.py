"""`model1 plan` from the command line to what it prints."""

import json
from pathlib import Path

import pytest

from cluster.main import main

EXPERTS = ("plan", "experts", "--experts", "16", "--replicas", "4", "--topk", "2", "--drifts", "2")


def test_experts_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EXPERTS, "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "16 experts on 4 replicas and 12.5% more copies; top-2 by Zipf(1.2)" in out
    assert "seed 5" in out
    assert "of 2 drifts" in out


def test_experts_that_cannot_be_evened_out(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*EXPERTS, "--topk", "1", "--zipf", "3", "--redundancy", "0"]
    assert main(arguments) == 0
    assert "0.0% more copies cannot reach 0.9" in capsys.readouterr().out


def test_experts_as_json_and_as_a_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "balance.svg"
    assert main([*EXPERTS, "--format", "json", "--plot", str(plot)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["scenario"]["num_experts"] == 16
    assert len(printed["drifts"]) == 2
    assert len(printed["balances"]) == 2 * printed["scenario"]["drift_every_seconds"]
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("--replicas", "17"), "--replicas 17: there are 16 experts"),
        (("--topk", "17"), "--topk 17"),
        (("--zipf", "-1"), "-1 must be 0 or more"),
        (("--redundancy", "nan"), "nan must be 0 or more"),
        (("--plot", "/nowhere/balance.svg"), "/nowhere"),
    ],
)
def test_what_cannot_be_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], value: str
) -> None:
    code: object
    try:
        code = main([*EXPERTS, *arguments])
    except SystemExit as exit_of_argparse:
        code = exit_of_argparse.code
    assert code == 2
    assert value in capsys.readouterr().err


def _write_trace(path: Path) -> Path:
    path.write_text("seconds,requests_per_second\n0,10\n600,100\n1200,10\n3600,10\n")
    return path


def test_a_recorded_load_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = _write_trace(tmp_path / "monday.csv")
    assert main(["plan", "autoscale", "--trace", str(trace), "--max-replicas", "9"]) == 0
    out = capsys.readouterr().out
    assert "1 to 9 replicas" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("monday"))
    assert row[1:3] == ["1.0", "15"]  # hours; 100 requests/s at 7 a replica


def test_loads_as_json_and_as_a_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, plot = _write_trace(tmp_path / "monday.csv"), tmp_path / "replicas.svg"
    arguments = ["--trace", str(trace), "--plot", str(plot), "--format", "json"]
    assert main(["plan", "autoscale", *arguments]) == 0
    (load,) = json.loads(capsys.readouterr().out)["loads"]
    assert 0 < load["replica_hours"] < load["fixed_replica_hours"] == 15
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("--trace", "/nowhere.csv"), "--trace /nowhere.csv"),
        (("--busy-share", "1.5"), "1.5 must be above 0 and at most 1"),
        (("--queue-seconds", "0"), "0 must be above 0"),
        (("--peak", "1e300"), "1e300 must be above 0 and below 1e9"),
        (("--plot", "/nowhere/replicas.svg"), "/nowhere"),
    ],
)
def test_a_fleet_that_cannot_be_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], value: str
) -> None:
    code: object
    try:
        code = main(["plan", "autoscale", *arguments])
    except SystemExit as exit_of_argparse:
        code = exit_of_argparse.code
    assert code == 2
    assert value in capsys.readouterr().err
