"""A disk or a Redis that fails under traffic: right tokens, told by stat, back by itself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from services.kvstore.tier import Tier
from tests.soak import faults
from tests.soak.bad_disk import can_mount, failing_disk, small_disk
from tests.soak.degraded import DegradedReport, degrade, store_config
from tests.soak.faults import Redis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
needs_mount = pytest.mark.skipif(not can_mount(), reason="needs to mount file systems")


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    async with Redis.running(tmp_path) as server:
        yield server


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (faults.redis_stopped, "cannot be reached"),
        (faults.redis_slow, "slow"),
        (faults.redis_refuses_auth, "refuses our credentials"),
        (faults.redis_out_of_memory, "memory"),
    ],
)
async def test_redis_fails(fault, told: str, redis: Redis, tmp_path: Path) -> None:
    config = store_config(tmp_path, tmp_path / "disk", redis)
    _is_right(await degrade(Tier.COLD, config, partial(fault, redis), told=told))


async def test_redis_is_wiped(redis: Redis, tmp_path: Path) -> None:
    config = store_config(tmp_path, tmp_path / "disk", redis)
    _is_right(await degrade(Tier.COLD, config, partial(faults.redis_wiped, redis), told=""))


@needs_mount
async def test_the_disk_is_full(redis: Redis, tmp_path: Path) -> None:
    with small_disk(tmp_path / "mounted", 32 << 20) as disk:
        config = store_config(tmp_path, disk.path / "blobs", redis)
        fault = partial(faults.disk_full, disk)
        _is_right(await degrade(Tier.DISK, config, fault, told="ENOSPC"))


@needs_mount
async def test_the_disk_returns_errors(redis: Redis, tmp_path: Path) -> None:
    with failing_disk(tmp_path / "failing", 64 << 20) as disk:
        config = store_config(tmp_path, disk.path / "blobs", redis)
        fault = partial(faults.disk_returns_errors, disk)
        _is_right(await degrade(Tier.DISK, config, fault, told="EIO"))


@needs_mount
async def test_the_disk_is_read_only(redis: Redis, tmp_path: Path) -> None:
    """From the start: a file system that is written to cannot be made so."""
    with small_disk(tmp_path / "mounted", 32 << 20) as disk:
        disk.set_writable(False)

        @asynccontextmanager
        async def until_writable() -> AsyncIterator[None]:
            yield
            disk.set_writable(True)

        config = store_config(tmp_path, disk.path / "blobs", redis)
        _is_right(await degrade(Tier.DISK, config, until_writable, told="EROFS"))


def _is_right(report: DegradedReport) -> None:
    print(report)
    assert (report.different_tokens, report.different_logits) == (0, 0)
    assert report.waves == ["before", "before", "during", "after"]
    assert report.compared_tokens > 0
    assert report.stored_after > 0
