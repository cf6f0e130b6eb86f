from pathlib import Path

from services.kvstore.tier_bench import BenchSize, checksum_speed, measure


def test_every_tier_is_measured_both_ways(tmp_path: Path) -> None:
    speeds = measure(tmp_path, BenchSize(blob_bytes=300_000, num_blobs=3, rounds=2))
    assert [speed.name.split()[0] for speed in speeds] == ["RAM"] * 3 + ["disk"] * 2 + ["Redis"] * 2
    assert all(min(speed.ours, speed.plain, speed.ratio) > 0 for speed in speeds)
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_is_measured() -> None:
    assert checksum_speed(10_000, seconds=0.01) > 0
