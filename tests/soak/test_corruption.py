"""Damage through each tier's real read path: every case is detected, and each is a miss."""

from pathlib import Path

import pytest

from services.kvstore.tier import Tier
from tests.soak.corruption import corrupt
from tests.soak.damage import Damage
from tests.soak.sites import ArenaSite, DiskSite, Site

SITES = (ArenaSite(Tier.RAM), DiskSite(), ArenaSite(Tier.PEER))


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.tier.name)
async def test_damage_is_a_miss(site: Site, tmp_path: Path) -> None:
    tally = await corrupt(site, num_cases=600, seed=1, directory=tmp_path)
    assert tally.undetected == 0, tally
    assert tally.lost_controls == 0, tally
    assert tally.controls > 0
    assert set(tally.injected) == {damage.value for damage in Damage}
