import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.kvstore.blob import HEADER_BYTES, Damaged, DamageReason
from services.kvstore.disk import DiskConfig, DiskInUse, DiskTier, FsyncPolicy
from services.kvstore.segment import RECORD_ALIGNMENT, record_nbytes
from tests.services.kvstore.sample_blobs import sample_blob, sample_key

PAYLOAD = 1000
BLOB = HEADER_BYTES + PAYLOAD
RECORD = record_nbytes(BLOB)
SEGMENT = 4 * RECORD


def _config(directory: Path, **changes: object) -> DiskConfig:
    settings = {"max_bytes": 100 * SEGMENT, "segment_bytes": SEGMENT} | changes
    return DiskConfig(directory=directory, **settings)  # type: ignore[arg-type]


def _put(tier: DiskTier, *numbers: int) -> None:
    for number in numbers:
        assert tier.put(sample_key(number), sample_blob(number, PAYLOAD))


def _get(tier: DiskTier, number: int) -> bytes | None:
    out = memoryview(bytearray(BLOB))
    header = tier.get_into(sample_key(number), out)
    if header is None:
        return None
    assert header.key == sample_key(number)
    return bytes(out)


def _held(tier: DiskTier) -> list[int]:
    return sorted(int.from_bytes(key, "big") for key in tier.keys())  # noqa: SIM118


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.segment"))


def test_what_was_put_comes_back_also_after_a_restart(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path / "kv"))
    _put(tier, *range(10))
    for reopened in (False, True):
        if reopened:
            tier.close()
            tier = DiskTier(_config(tmp_path / "kv"))
            assert tier.counts.scanned_blobs == 10
        assert _held(tier) == list(range(10))
        assert all(_get(tier, number) == bytes(sample_blob(number)) for number in range(10))
        assert _get(tier, 10) is None
        assert tier.nbytes_of(sample_key(3)) == BLOB
        assert tier.nbytes_of(sample_key(10)) is None
        assert tier.used_bytes == 10 * RECORD
        tier.check()
    _put(tier, 10)  # into a segment of its own: those of another life are not written to
    assert len(_segments(tmp_path / "kv")) == 4
    tier.close()


def test_files_are_private(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path / "kv"))
    _put(tier, 1)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kv").iterdir()} == {0o600}
    tier.close()


def test_a_second_put_of_a_key_writes_nothing(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    _put(tier, 1, 1)
    assert (tier.num_blobs, tier.used_bytes) == (1, RECORD)
    tier.close()


def test_a_damaged_blob_is_not_written(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    blob = sample_blob(1)
    blob[500] ^= 1
    with pytest.raises(Damaged) as caught:
        tier.put(sample_key(1), blob)
    assert caught.value.reason is DamageReason.PAYLOAD_CHECKSUM
    with pytest.raises(Damaged):
        tier.put(sample_key(2), sample_blob(1))
    assert tier.used_bytes == 0
    tier.close()


def test_a_buffer_too_short_for_the_blob_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    _put(tier, 1)
    with pytest.raises(ValueError, match="10 bytes have no room for a blob of 1128"):
        tier.get_into(sample_key(1), memoryview(bytearray(10)))
    tier.close()


def test_two_stores_cannot_share_a_directory(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    with pytest.raises(DiskInUse, match=str(tmp_path)):
        DiskTier(_config(tmp_path))
    tier.close()
    tier.close()
    DiskTier(_config(tmp_path)).close()


def test_a_closed_tier_holds_and_takes_nothing(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    _put(tier, 1)
    tier.close()
    assert _get(tier, 1) is None
    assert not tier.put(sample_key(2), sample_blob(2))
    tier.tick()
    assert len(_segments(tmp_path)) == 1


@pytest.mark.parametrize("policy", FsyncPolicy)
def test_every_fsync_policy_stores_blobs(tmp_path: Path, policy: FsyncPolicy) -> None:
    tier = DiskTier(_config(tmp_path, fsync=policy, fsync_interval_seconds=0.0))
    _put(tier, *range(6))
    tier.tick()
    tier.flush()
    assert tier.degraded is None
    tier.close()


# Room


def test_the_budget_holds_and_the_oldest_segments_go(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path, max_bytes=3 * SEGMENT))
    for number in range(40):
        _put(tier, number)
        assert tier.used_bytes <= 3 * SEGMENT
        assert sum(path.stat().st_size for path in _segments(tmp_path)) == tier.used_bytes
    assert _held(tier) == list(range(28, 40))
    assert (tier.counts.evicted_blobs, tier.counts.evicted_bytes) == (28, 7 * SEGMENT)
    tier.check()
    tier.close()


def test_blobs_that_were_read_or_are_pinned_outlive_their_segment(tmp_path: Path) -> None:
    pinned = {sample_key(0)}
    tier = DiskTier(_config(tmp_path, max_bytes=2 * SEGMENT), is_pinned=pinned.__contains__)
    _put(tier, *range(8))
    for number in (1, 2, 3):
        assert _get(tier, number) is not None
    _put(tier, 8)
    # Half a segment at most is kept: the pinned blob, then those read.
    assert _held(tier) == [0, 1, 4, 5, 6, 7, 8]
    assert tier.counts.kept_blobs == 2
    assert _get(tier, 0) == bytes(sample_blob(0))
    _put(tier, *range(9, 30))
    assert 0 in _held(tier)
    pinned.clear()
    _put(tier, *range(30, 50))
    assert 0 not in _held(tier)
    tier.check()
    tier.close()


def test_a_segment_full_of_pins_is_passed_over_until_nothing_else_is_left(tmp_path: Path) -> None:
    pinned = {sample_key(number) for number in range(4)}
    tier = DiskTier(_config(tmp_path, max_bytes=2 * SEGMENT), is_pinned=pinned.__contains__)
    _put(tier, *range(13))
    assert _held(tier) == [0, 1, 2, 3, 12]
    pinned.update(sample_key(number) for number in range(100))
    _put(tier, *range(13, 60))  # more pins than the budget holds: the oldest give way
    assert tier.used_bytes <= 2 * SEGMENT
    assert 0 not in _held(tier)
    assert 59 in _held(tier)
    tier.close()


def test_a_smaller_budget_is_met_when_the_tier_opens(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    _put(tier, *range(20))
    tier.close()
    tier = DiskTier(_config(tmp_path, max_bytes=2 * SEGMENT))
    assert _held(tier) == list(range(12, 20))
    tier.close()


def test_a_blob_larger_than_a_segment_gets_its_own_and_one_larger_than_the_budget_none(
    tmp_path: Path,
) -> None:
    tier = DiskTier(_config(tmp_path, max_bytes=2 * SEGMENT))
    _put(tier, 1)
    large = sample_blob(2, SEGMENT)
    assert tier.put(sample_key(2), large)
    out = memoryview(bytearray(len(large)))
    assert tier.get_into(sample_key(2), out) is not None
    assert out == large
    assert not tier.put(sample_key(3), sample_blob(3, 2 * SEGMENT))
    assert tier.counts.refused_blobs == 1
    assert tier.degraded is None
    tier.check()
    tier.close()


def test_evict_frees_at_least_what_was_asked(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path), is_pinned=lambda key: True)
    _put(tier, *range(10))
    assert tier.evict(RECORD) == SEGMENT
    assert tier.evict(100 * SEGMENT) == 6 * RECORD
    assert (tier.num_blobs, tier.used_bytes, _segments(tmp_path)) == (0, 0, [])
    assert tier.evict(1) == 0
    _put(tier, 11)
    tier.close()


def test_a_deleted_blob_is_gone_from_the_disk(tmp_path: Path) -> None:
    tier = DiskTier(_config(tmp_path))
    _put(tier, 1, 2, 3)
    assert tier.delete(sample_key(2))
    assert not tier.delete(sample_key(2))
    assert _get(tier, 2) is None
    (segment,) = _segments(tmp_path)
    assert bytes(sample_blob(2))[HEADER_BYTES : HEADER_BYTES + 16] not in segment.read_bytes()
    tier.close()
    tier = DiskTier(_config(tmp_path))
    assert _held(tier) == [1, 3]
    assert _get(tier, 3) is not None
    tier.close()


# Damage


def _written(directory: Path, num_blobs: int, payload: int = PAYLOAD) -> bytes:
    """One segment of so many blobs, left by a store that is gone."""
    tier = DiskTier(_config(directory, segment_bytes=100 * RECORD))
    for number in range(num_blobs):
        assert tier.put(sample_key(number), sample_blob(number, payload))
    tier.close()
    return _segments(directory)[0].read_bytes()


def test_a_tail_torn_at_any_byte_is_cut_and_the_rest_is_whole(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    config = _config(directory, segment_bytes=100 * RECORD, fsync=FsyncPolicy.NEVER)
    payload = 300
    whole = _written(directory, 3, payload)
    (segment,) = _segments(directory)
    record = len(whole) // 3
    for length in range(2 * record, len(whole)):
        segment.write_bytes(whole[:length])
        tier = DiskTier(config)
        is_whole = length >= 2 * record + HEADER_BYTES + payload  # only padding is missing
        assert _held(tier) == ([0, 1, 2] if is_whole else [0, 1])
        assert tier.counts.cut_bytes == (0 if is_whole else length - 2 * record)
        tier.close()
        if length % 29 == 0:  # and what is appended comes back, too
            tier = DiskTier(config)
            _put(tier, 7)
            tier.close()
            tier = DiskTier(config)
            assert all(_get(tier, number) is not None for number in _held(tier))
            assert 7 in _held(tier)
            tier.close()
            for later in _segments(directory)[1:]:
                later.unlink()


def test_a_tail_whose_pages_never_reached_the_disk_is_cut(tmp_path: Path) -> None:
    whole = _written(tmp_path, 4)
    (segment,) = _segments(tmp_path)
    # The file has its length and the headers; the last two payloads are zeros.
    torn = bytearray(whole)
    for record in (2, 3):
        start = record * RECORD + HEADER_BYTES + 100
        torn[start : (record + 1) * RECORD] = bytes((record + 1) * RECORD - start)
    segment.write_bytes(torn)
    tier = DiskTier(_config(tmp_path))
    assert _held(tier) == [0, 1]
    assert tier.counts.cut_bytes == 2 * RECORD
    assert segment.stat().st_size == 2 * RECORD
    tier.close()


@pytest.mark.parametrize("at", [0, 9, 40, 119, 127, HEADER_BYTES, HEADER_BYTES + 500, BLOB - 1])
def test_a_flipped_bit_under_a_running_tier_is_a_counted_miss(tmp_path: Path, at: int) -> None:
    tier = DiskTier(_config(tmp_path))
    _put(tier, 0, 1, 2)
    (segment,) = _segments(tmp_path)
    with segment.open("r+b") as file:
        file.seek(RECORD + at)
        (byte,) = file.read(1)
        file.seek(RECORD + at)
        file.write(bytes([byte ^ 0x10]))
    with pytest.raises(Damaged):
        _get(tier, 1)
    assert _get(tier, 1) is None  # dropped
    assert [_get(tier, number) is None for number in (0, 2)] == [False, False]
    _put(tier, 1)
    assert _get(tier, 1) == bytes(sample_blob(1))
    tier.close()
    tier = DiskTier(_config(tmp_path))
    assert _held(tier) == [0, 1, 2]
    assert _get(tier, 1) == bytes(sample_blob(1))
    tier.close()


def test_swapped_payloads_swapped_records_and_zero_pages_are_found(tmp_path: Path) -> None:
    whole = bytearray(_written(tmp_path, 6))
    (segment,) = _segments(tmp_path)

    def payload(record: int) -> slice:
        return slice(record * RECORD + HEADER_BYTES, record * RECORD + BLOB)

    whole[payload(0)], whole[payload(1)] = whole[payload(1)], whole[payload(0)]
    whole[2 * RECORD + 512 : 2 * RECORD + 1024] = bytes(512)
    segment.write_bytes(whole)
    tier = DiskTier(_config(tmp_path))
    records = [slice(record * RECORD, (record + 1) * RECORD) for record in range(6)]
    whole[records[3]], whole[records[4]] = whole[records[4]], whole[records[3]]
    segment.write_bytes(whole)  # under its feet: headers verify, but of another key
    report = tier.verify(repair=False)
    assert (report.num_blobs, dict(report.damaged)) == (
        6,
        {DamageReason.PAYLOAD_CHECKSUM: 3, DamageReason.KEY: 2},
    )
    assert tier.verify(repair=True) == report
    assert tier.verify(repair=True).damaged == {}
    assert _held(tier) == [5]
    tier.close()


def test_garbage_between_records_costs_only_itself(tmp_path: Path) -> None:
    whole = bytearray(_written(tmp_path, 5))
    (segment,) = _segments(tmp_path)
    whole[RECORD : RECORD + HEADER_BYTES] = b"\xff" * HEADER_BYTES
    # A magic that is not on a record's place must not be taken for one.
    whole[RECORD + 700 : RECORD + 708] = b"MODEL1KV"
    segment.write_bytes(bytes(RECORD_ALIGNMENT) * 3 + whole)
    tier = DiskTier(_config(tmp_path))
    assert _held(tier) == [0, 2, 3, 4]
    assert all(_get(tier, number) == bytes(sample_blob(number)) for number in _held(tier))
    tier.close()


def test_garbage_longer_than_a_search_step_is_skipped(tmp_path: Path) -> None:
    whole = _written(tmp_path, 2)
    (segment,) = _segments(tmp_path)
    segment.write_bytes(whole[:RECORD] + bytes((3 << 20) + 512) + whole[RECORD:])
    tier = DiskTier(_config(tmp_path, max_bytes=4 << 20))
    assert _held(tier) == [0, 1]
    assert _get(tier, 1) == bytes(sample_blob(1))
    tier.close()


def test_the_later_of_two_records_of_a_key_counts(tmp_path: Path) -> None:
    whole = bytearray(_written(tmp_path, 2))
    segment = _segments(tmp_path)[0]
    whole[HEADER_BYTES] ^= 1
    segment.write_bytes(whole)
    (tmp_path / "000000000002.segment").write_bytes(bytes(sample_blob(0)))
    tier = DiskTier(_config(tmp_path))
    assert _get(tier, 0) == bytes(sample_blob(0))
    tier.check()
    tier.close()


def test_foreign_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "my.segment").write_text("mine too")
    (tmp_path / "000000000007.segment").mkdir()
    tier = DiskTier(_config(tmp_path, max_bytes=SEGMENT))
    _put(tier, *range(20))
    tier.evict(1 << 30)
    tier.close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "my.segment").read_text() == "mine too"


def test_readers_are_undisturbed_by_eviction_and_deletion(tmp_path: Path) -> None:
    """Threads read while the log turns over: right bytes or a miss, never another file's."""
    tier = DiskTier(_config(tmp_path, max_bytes=3 * SEGMENT))
    stop = threading.Event()
    failures: list[str] = []
    hits = 0

    def read() -> None:
        nonlocal hits
        out = memoryview(bytearray(BLOB))
        while not stop.is_set():
            for key in tier.keys():  # noqa: SIM118
                try:
                    if tier.get_into(key, out) is not None:
                        hits += 1
                        if out != sample_blob(int.from_bytes(key, "big")):
                            failures.append("other bytes")
                except Damaged as error:
                    failures.append(str(error.reason))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(200):
            _put(tier, number)
            if number % 3 == 2:
                tier.delete(sample_key(number - 1))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert failures == []
    assert hits > 0
    tier.check()
    tier.close()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    for _ in range(3):
        tier = DiskTier(_config(tmp_path, max_bytes=3 * SEGMENT))
        _put(tier, *range(40))
        assert open_files() <= before + 4
        tier.close()
        assert open_files() == before


class AnyUseOfADisk(RuleBasedStateMachine):
    """Against a dict: the tier may lose what it had to evict, and nothing else, and lies never."""

    NUMBERS = st.integers(0, 25)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.pinned: set[bytes] = set()
        self.model: set[int] = set()
        self._open()

    def _open(self) -> None:
        config = _config(Path(self.folder.name), max_bytes=4 * SEGMENT)
        self.tier = DiskTier(config, is_pinned=self.pinned.__contains__)
        self.num_evicted = 0

    def teardown(self) -> None:
        self.tier.close()
        self.folder.cleanup()

    @rule(number=NUMBERS, size=st.integers(1, 3 * PAYLOAD))
    def put(self, number: int, size: int) -> None:
        assert self.tier.put(sample_key(number), sample_blob(number, size))
        assert sample_key(number) in self.tier.keys()  # noqa: SIM118
        self.model.add(number)

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        size = self.tier.nbytes_of(sample_key(number))
        if size is None:
            return
        assert number in self.model
        out = memoryview(bytearray(size + 10))
        header = self.tier.get_into(sample_key(number), out)
        assert header is not None
        assert out[:size] == sample_blob(number, header.payload_nbytes)

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        self.tier.delete(sample_key(number))
        self.model.discard(number)

    @rule(number=NUMBERS)
    def pin(self, number: int) -> None:
        self.pinned ^= {sample_key(number)}

    @rule()
    def restart(self) -> None:
        before = set(self.tier.keys())
        self.tier.close()
        self._open()
        assert set(self.tier.keys()) == before

    @precondition(lambda self: self.tier.num_blobs)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tier.keys())))
        entry = self.tier._log.find(key)
        assert entry is not None
        at = entry.offset + data.draw(st.integers(0, entry.nbytes - 1))
        with entry.slot.segment.path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))
        with pytest.raises(Damaged):
            self.tier.get_into(key, memoryview(bytearray(entry.nbytes)))
        self.model.discard(int.from_bytes(key, "big"))

    @invariant()
    def whole(self) -> None:
        self.tier.check()
        assert self.tier.used_bytes <= 4 * SEGMENT
        held = {int.from_bytes(key, "big") for key in self.tier.keys()}  # noqa: SIM118
        assert held <= self.model
        evicted = self.tier.counts.evicted_blobs
        assert len(self.model - held) == evicted - self.num_evicted
        self.model, self.num_evicted = held, evicted
        assert self.tier.degraded is None


TestAnyUseOfADisk = AnyUseOfADisk.TestCase
TestAnyUseOfADisk.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
