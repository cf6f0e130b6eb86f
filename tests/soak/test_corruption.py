"""Damage through each tier's real read path: every case is detected, and each is a miss."""

from pathlib import Path

import pytest

from services.kvstore.tier import Tier
from tests.soak.blobs import Tally
from tests.soak.corruption import corrupt
from tests.soak.damage import Damage
from tests.soak.sites import ArenaSite, DiskSite, RedisSite, Site

SITES = (ArenaSite(Tier.RAM), DiskSite(), ArenaSite(Tier.PEER), RedisSite())


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.tier.name)
async def test_damage_is_a_miss(site: Site, tmp_path: Path) -> None:
    await _all_detected(site, 150, tmp_path)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "total",
    [
        pytest.param(20_000, marks=pytest.mark.slow),
        pytest.param(100_000, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.tier.name)
async def test_many_cases_of_damage_are_misses(site: Site, total: int, tmp_path: Path) -> None:
    tally = await _all_detected(site, total // len(SITES), tmp_path)
    print(tally)


async def _all_detected(site: Site, num_cases: int, directory: Path) -> Tally:
    tally = await corrupt(site, num_cases=num_cases, seed=1, directory=directory)
    assert tally.undetected == 0, tally
    assert tally.lost_controls == 0, tally
    assert tally.controls > 0
    assert tally.injected.total() >= num_cases
    assert set(tally.injected) == {damage.value for damage in Damage}
    return tally
