"""Sessions whose blocks move through every pair of tiers say what resident ones say."""

from pathlib import Path

import pytest

from tests.soak.places import PAIRS, Place
from tests.soak.soak import SoakReport, soak
from tests.soak.traffic import LONGEST_TOKENS


async def test_a_few_sessions_say_what_resident_ones_say(tmp_path: Path) -> None:
    report = await _soak(8, 1000, tmp_path)
    assert report.num_resumes >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_a_thousand_sessions_through_every_pair_of_tiers(tmp_path: Path) -> None:
    report = await _soak(1700, LONGEST_TOKENS, tmp_path)
    print(report.table())
    assert report.resumes.sessions >= 1000
    assert set(report.resumes.by_pair) == {str(pair) for pair in PAIRS}
    assert all(report.resumes.tokens[place] > 0 for place in Place)


async def _soak(count: int, longest_tokens: int, directory: Path) -> SoakReport:
    report = await soak(
        seed=1, first=0, count=count, directory=directory, longest_tokens=longest_tokens
    )
    assert report.sessions == count
    assert (report.different_tokens, report.different_logits) == (0, 0), report.table()
    assert report.compared_tokens == report.compared_logits > count
    return report
