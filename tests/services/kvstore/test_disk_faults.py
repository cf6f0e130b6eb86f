"""A disk that fails in each way that a real one does; every error comes from the kernel."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.kvstore.blob import Damaged, DamageReason
from services.kvstore.disk import DiskConfig, DiskTier
from services.kvstore.segment import record_nbytes
from tests.services.kvstore.sample_blobs import sample_blob, sample_key

PAYLOAD = 1000
BLOB = len(sample_blob(0, PAYLOAD))
SEGMENT = 4 * record_nbytes(BLOB)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _tier(directory: Path, clock: Clock) -> DiskTier:
    config = DiskConfig(directory, 100 * SEGMENT, segment_bytes=SEGMENT, probe_seconds=1.0)
    return DiskTier(config, clock=clock)


def _put(tier: DiskTier, number: int) -> bool:
    return tier.put(sample_key(number), sample_blob(number, PAYLOAD))


def _has(tier: DiskTier, number: int) -> bool:
    out = memoryview(bytearray(BLOB))
    if tier.get_into(sample_key(number), out) is None:
        return False
    assert out == sample_blob(number, PAYLOAD)
    return True


def _probe(tier: DiskTier, clock: Clock) -> None:
    clock.now += 1.0
    tier.tick()


@contextmanager
def _broken_device(path: Path) -> Iterator[None]:
    """Every open descriptor of the file leads to where reads and writes end in EIO.

    That is our own memory near address 0. What is opened anew is the file again.
    """
    memory = os.open("/proc/self/mem", os.O_RDWR)
    broken = 0
    try:
        for name in os.listdir("/proc/self/fd"):
            link = Path("/proc/self/fd", name)
            if os.path.lexists(link) and os.readlink(link) == str(path):
                os.dup2(memory, int(name))
                broken += 1
    finally:
        os.close(memory)
    assert broken, f"nobody has {path} open"
    yield


def test_a_read_error_stops_the_tier_until_a_probe_works(tmp_path: Path, clock: Clock) -> None:
    tier = _tier(tmp_path, clock)
    assert all(_put(tier, number) for number in range(3))
    (segment,) = tmp_path.glob("*.segment")
    with _broken_device(segment):
        assert not _has(tier, 1)
    assert tier.degraded == "read EIO: Input/output error"
    assert tier.nbytes_of(sample_key(0)) is None  # nobody waits for a broken device
    assert not _put(tier, 5)
    tier.tick()
    assert tier.degraded is not None  # not before it is due
    _probe(tier, clock)
    assert tier.degraded is None
    assert [_has(tier, number) for number in range(3)] == [True, True, True]
    assert _put(tier, 5)
    assert tier.counts.failures == {"read EIO": 1}
    assert tier.counts.refused_blobs == 1
    tier.check()
    tier.close()


def test_a_write_error_stops_writing_and_not_reading(tmp_path: Path, clock: Clock) -> None:
    tier = _tier(tmp_path, clock)
    assert all(_put(tier, number) for number in range(5))
    newest = max(tmp_path.glob("*.segment"))
    with _broken_device(newest):
        assert not _put(tier, 5)
    assert tier.degraded == "write EIO: Input/output error"
    assert _has(tier, 1)
    _probe(tier, clock)
    assert tier.degraded is None
    assert _put(tier, 5)
    assert [_has(tier, number) for number in range(6)] == [True] * 6
    tier.close()


def test_a_failed_sync_is_a_fault(tmp_path: Path, clock: Clock) -> None:
    tier = _tier(tmp_path, clock)
    assert _put(tier, 0)
    (segment,) = tmp_path.glob("*.segment")
    with _broken_device(segment):
        _probe(tier, clock)  # the interval has passed
    assert tier.degraded is not None
    assert tier.degraded.startswith("sync ")
    _probe(tier, clock)
    assert tier.degraded is None
    assert _has(tier, 0)
    tier.close()


def test_a_blob_that_cannot_be_erased_says_so(tmp_path: Path, clock: Clock) -> None:
    tier = _tier(tmp_path, clock)
    assert _put(tier, 0)
    (segment,) = tmp_path.glob("*.segment")
    with _broken_device(segment):
        assert not tier.delete(sample_key(0))
    assert tier.degraded == "erase EIO: Input/output error"
    _probe(tier, clock)
    assert tier.delete(sample_key(0))
    tier.close()


def test_a_file_that_may_not_grow_is_a_fault_and_leaves_no_half_record(
    tmp_path: Path, clock: Clock
) -> None:
    tier = _tier(tmp_path, clock)
    assert _put(tier, 0)
    before = tier.used_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 700, hard))
    try:
        assert not _put(tier, 1)  # 700 bytes fit
        assert tier.degraded == "write EFBIG: File too large"
        assert _has(tier, 0)
        _probe(tier, clock)
        assert tier.degraded is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tier.used_bytes == before
    _probe(tier, clock)
    assert tier.degraded is None
    assert _put(tier, 1)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.segment")) == tier.used_bytes
    tier.close()


def test_a_directory_that_cannot_be_made_is_a_degraded_tier(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "file").touch()
    tier = _tier(tmp_path / "file" / "kv", clock)
    assert tier.degraded == "open ENOTDIR: Not a directory"
    assert not _put(tier, 0)
    assert not _has(tier, 0)
    _probe(tier, clock)
    assert tier.degraded is not None
    (tmp_path / "file").unlink()
    _probe(tier, clock)
    assert tier.degraded is None
    assert _put(tier, 0)
    assert _has(tier, 0)
    tier.close()


def test_a_directory_that_is_wiped_costs_only_what_was_in_it(tmp_path: Path, clock: Clock) -> None:
    tier = _tier(tmp_path / "kv", clock)
    assert all(_put(tier, number) for number in range(8))
    shutil.rmtree(tmp_path / "kv")
    assert not _put(tier, 8)  # the next segment has nowhere to be
    assert tier.degraded == "write ENOENT: No such file or directory"
    _probe(tier, clock)
    assert tier.degraded is None
    assert _put(tier, 8)
    assert [_has(tier, number) for number in (0, 7, 8)] == [False, False, True]
    tier.check()
    tier.close()


def test_a_file_cut_under_its_feet_is_damage(tmp_path: Path, clock: Clock) -> None:
    tier = _tier(tmp_path, clock)
    assert all(_put(tier, number) for number in range(3))
    (segment,) = tmp_path.glob("*.segment")
    os.truncate(segment, record_nbytes(BLOB) + 10)
    for number in (1, 2):
        with pytest.raises(Damaged) as caught:
            _has(tier, number)
        assert caught.value.reason is DamageReason.TRUNCATED
    assert _has(tier, 0)
    assert tier.degraded is None
    tier.close()


# File systems that are full or read-only: in a mount namespace of a process of its own.


def _in_own_mounts(run: Callable[[Path], None], directory: Path) -> None:
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        probe = [*inside, "mount", "-t", "tmpfs", "none", str(directory)]
        subprocess.run(probe, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespaces here")
    script = (
        f"import sys, pathlib, {__name__} as module;"
        f"module.{run.__name__}(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([*inside, sys.executable, "-c", script, str(directory)], check=True)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _fill(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(file, bytes(4096)):
            pass
    os.close(file)


def use_a_full_disk(root: Path) -> None:
    clock = Clock()
    _mount("-t", "tmpfs", "-o", "size=256k", "none", root)
    tier = _tier(root / "kv", clock)
    number = 0
    while _put(tier, number):
        number += 1
    assert tier.degraded == "write ENOSPC: No space left on device"
    assert number > 50
    assert tier.counts.evicted_blobs == 4  # the oldest make way
    assert [_has(tier, n) for n in (0, 4, number - 1)] == [False, True, True]
    _probe(tier, clock)
    assert tier.degraded is None
    assert _put(tier, number)

    _fill(root / "others")
    number += 1
    while _put(tier, number):
        number += 1
    assert tier.degraded is not None
    assert _has(tier, number - 1)
    (root / "others").unlink()
    _probe(tier, clock)
    assert tier.degraded is None
    for each in range(number, number + 30):  # full of us: a segment goes for every four blobs
        if not _put(tier, each):
            _probe(tier, clock)
            assert _put(tier, each)
        assert _has(tier, each)
    tier.check()
    tier.close()


def use_a_read_only_disk(root: Path) -> None:
    clock = Clock()
    directory = root / "kv"
    _mount("-t", "tmpfs", "none", root)
    tier = _tier(directory, clock)
    assert all(_put(tier, number) for number in range(8))
    _mount("--bind", directory, directory)
    _mount("-o", "remount,bind,ro", directory)
    assert not _put(tier, 8)
    assert tier.degraded == "write EROFS: Read-only file system"
    assert all(_has(tier, number) for number in range(8))
    _probe(tier, clock)
    assert tier.degraded is not None
    assert _has(tier, 3)
    tier.close()

    tier = _tier(directory, clock)
    assert tier.degraded == "open EROFS: Read-only file system"
    assert all(_has(tier, number) for number in range(8))
    assert not _put(tier, 8)
    _mount("-o", "remount,bind,rw", directory)
    _probe(tier, clock)
    assert tier.degraded is None
    assert _put(tier, 8)
    assert all(_has(tier, number) for number in range(9))
    tier.check()
    tier.close()


def test_a_full_disk_refuses_makes_way_and_takes_again(tmp_path: Path) -> None:
    _in_own_mounts(use_a_full_disk, tmp_path)


def test_a_read_only_disk_is_read_and_written_again_when_it_can_be(tmp_path: Path) -> None:
    _in_own_mounts(use_a_read_only_disk, tmp_path)
