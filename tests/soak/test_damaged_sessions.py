"""Sessions that go on over damaged blocks of each tier: right tokens, no needless computing."""

from pathlib import Path

import pytest

from services.kvstore.tier import Tier
from tests.soak.damaged_sessions import TWINS_EVERY, go_on_over_damage
from tests.soak.sites import ArenaSite, DiskSite, RedisSite, Site

OTHER_SITES = (ArenaSite(Tier.RAM), ArenaSite(Tier.PEER), RedisSite())


@pytest.mark.slow  # test_kv_cache damages restores, too
async def test_a_few_sessions_go_on_over_damage(tmp_path: Path) -> None:
    await _go_on(ArenaSite(Tier.RAM), 6, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_sessions_go_on_over_damage_on_disk(tmp_path: Path) -> None:
    await _go_on(DiskSite(), 100, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("site", OTHER_SITES, ids=lambda site: site.tier.name)
async def test_sessions_go_on_over_damage_elsewhere(site: Site, tmp_path: Path) -> None:
    await _go_on(site, 100, tmp_path)


async def _go_on(site: Site, num_sessions: int, directory: Path) -> None:
    report = await go_on_over_damage(site, num_sessions=num_sessions, seed=1, directory=directory)
    print(report)
    assert (report.different_tokens, report.different_logits) == (0, 0)
    assert report.wrong_spans == []
    assert (report.sessions, report.twins) == (num_sessions, -(-num_sessions // TWINS_EVERY))
    assert report.damaged_blobs.total() >= num_sessions
