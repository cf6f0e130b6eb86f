"""What `model1 top` shows and records."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.access import Access
from cluster.client import Unreachable
from cluster.config import SettingsError
from cluster.figures import figures
from cluster.plan.load_curves import read_curve
from cluster.readings import Windows
from cluster.top import Look, as_text, recording, show_in_place, top
from protos.control_pb2 import (
    GetKvStatsResponse,
    GetServerInfoResponse,
    GetTopologyResponse,
    Member,
)


def test_a_recorded_load_is_what_the_plan_reads(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    with recording(file, since=100.0) as load:
        assert load is not None
        load.measured(2.5, until=102.0)
        load.measured(7.25, until=104.0)
    assert read_curve(file).rates.tolist() == [2.5, 2.5, 7.25, 7.25]


def test_a_recording_that_is_broken_off_is_whole_up_to_then(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    with recording(file, since=0.0) as load:
        assert load is not None
        load.measured(1.0, until=2.0)
        load.measured(2.0, until=4.0)
        assert read_curve(file).rates.tolist() == [1.0, 1.0]


def test_a_recording_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "load.csv").write_text("mine")
    with (
        pytest.raises(SettingsError, match=r"--record .*load\.csv: File exists"),
        recording(tmp_path / "load.csv", since=0.0),
    ):
        raise AssertionError("never here")
    assert (tmp_path / "load.csv").read_text() == "mine"


def test_nobody_at_the_endpoint_is_said_at_once_and_nothing_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "load.csv"
    with pytest.raises(Unreachable):
        asyncio.run(
            top(Access("127.0.0.1:9"), interval_seconds=1, once=True, as_json=False, record=file)
        )
    assert not file.exists()


def test_a_look_takes_the_place_of_the_last_and_no_more_than_the_terminal_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setenv("LINES", "4")
    show_in_place("a line\nanother\n\nlast\nnever seen")
    assert capsys.readouterr().out == "\x1b[Ha lin\x1b[K\nanoth\x1b[K\n\x1b[K\n\x1b[J"


def test_who_is_not_ready_and_who_was_started_again_is_named() -> None:
    members = [Member(name=f"expert-0-{i}", role="expert", state="ready") for i in range(9)]
    members[3].state, members[5].restarts = "dead", 2
    for member in members[6:]:
        member.state = "starting"
    members[0].state = "draining"
    look = Look(
        "host:1",
        datetime.now(UTC),
        GetServerInfoResponse(uptime_seconds=7),
        GetTopologyResponse(epoch=3, members=members),
        GetKvStatsResponse(),
        figures(members, Windows()),
    )
    first, second = as_text(look).splitlines()[:2]
    assert first.endswith("host:1 serving, up 7 s, routing epoch 3")
    assert second == (
        "4 of 9 processes ready; expert-0-0 draining, expert-0-3 dead, expert-0-6 starting, "
        "expert-0-7 starting and 1 more; started again: expert-0-5 2"
    )
