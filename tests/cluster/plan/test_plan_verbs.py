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
