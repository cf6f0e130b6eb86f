"""Aborted requests leave nothing behind, in any tier."""

from pathlib import Path

import pytest

from tests.soak.aborts import abort_many

# Of the allocator's ups and downs; what leaked at every abort would be far above it.
MAX_GROWTH = 0.1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "aborts",
    [pytest.param(2_000, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.long)],
)
async def test_aborts_leave_nothing(aborts: int, tmp_path: Path) -> None:
    report = await abort_many(aborts, seed=1, directory=tmp_path)
    print(
        f"{report.aborted} aborts and {report.finished} answers; resident MiB of worker and "
        f"stores: {[[n >> 20 for n in sizes] for sizes in report.rss_bytes]}; "
        f"growth {[f'{growth:+.1%}' for growth in report.growth]}"
    )
    assert report.aborted >= aborts
    assert max(report.growth) < MAX_GROWTH
