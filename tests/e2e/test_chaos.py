"""Two minutes of faults at random under load: nobody gets a wrong token or none."""

import pytest

from tests.e2e.command import run_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_streams_notice_nothing_of_two_minutes_of_faults() -> None:
    report = run_json("chaos", "run", "--minutes", "2", "--seed", "4", timeout_seconds=500)
    assert (report["wrong"], report["failed"], report["not_recovered"]) == ([], [], "")
    assert report["requests"] > report["streams"]
    assert sum(fault["count"] for fault in report["faults"].values()) >= 5
