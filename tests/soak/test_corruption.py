"""Damage through each tier's real read path: every case is detected, and each is a miss."""

from pathlib import Path

import pytest

from services.kvstore.tier import Tier
from tests.soak.corruption import ArenaSite, DiskSite, Site, corrupt
from tests.soak.damage import Damage

SITES = {
    "ram": (Tier.RAM, ArenaSite(of_peer=False)),
    "disk": (Tier.DISK, DiskSite()),
    "peer": (Tier.PEER, ArenaSite(of_peer=True)),
}


@pytest.mark.parametrize(("tier", "site"), SITES.values(), ids=SITES)
async def test_damage_is_a_miss(tier: Tier, site: Site, tmp_path: Path) -> None:
    tally = await corrupt(tier, site, num_cases=600, seed=1, directory=tmp_path)
    assert tally.undetected == 0, tally
    assert tally.lost_controls == 0, tally
    assert tally.controls > 0
    assert set(tally.injected) == {damage.value for damage in Damage}
