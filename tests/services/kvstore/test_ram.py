"""RamTier against a tiny model: any sequence of uses, drops, evictions and reservations."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.kvstore.arena import Arena
from services.kvstore.blob import BlobHeader, BlobKind, seal_into
from services.kvstore.ram import MAX_SPARED, RamTier, Reservation, Resident
from services.kvstore.s3_fifo import S3Fifo
from tests.services.kvstore.blobs import LAYOUT_DIGEST, MODEL_DIGEST, key_of

RAM_BYTES = 16 * 4096
NUMBERS = st.integers(0, 30)


def _header(number: int, nbytes: int) -> BlobHeader:
    return BlobHeader(
        kind=BlobKind.BODY,
        key=key_of(number),
        model_digest=MODEL_DIGEST,
        layout_digest=LAYOUT_DIGEST,
        start=0,
        end=128,
        payload_nbytes=nbytes,
    )


def _fill(number: int, view: memoryview) -> None:
    view[:] = bytes([number]) * len(view)


class AnyUseOfRam(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 0.0
        self.unsaved = set[bytes]()
        self.pinned = set[bytes]()
        self.ram = RamTier(
            Arena.create(Path(self.folder.name) / "ram.arena", RAM_BYTES),
            S3Fifo(),
            clock=lambda: self.now,
            unsaved=self.unsaved.__contains__,
            pinned=self.pinned.__contains__,
        )
        self.reserved: list[tuple[Reservation, BlobHeader, int]] = []
        self.used: list[Resident] = []

    @rule(number=NUMBERS, nbytes=st.sampled_from((500, 3000, 5000, 2 * RAM_BYTES)))
    def reserve(self, number: int, nbytes: int) -> None:
        header = _header(number, nbytes)
        held = {id(resident) for resident in self.used}
        pinned = {key for key in self.pinned if key in self.ram}
        reservation = self.ram.reserve(header.key, header.nbytes)
        if reservation is not None:
            seal_into(
                self.ram.arena.view(reservation.span), header, lambda view: _fill(number, view)
            )
            self.reserved.append((reservation, header, number))
        assert pinned <= set(self.ram)
        assert all(not each.leaving or each.users for each in self.used if id(each) in held)

    @rule(data=st.data(), keep=st.booleans(), save=st.booleans())
    def fill(self, data: st.DataObject, keep: bool, save: bool) -> None:
        if not self.reserved:
            return
        place = data.draw(st.integers(0, len(self.reserved) - 1))
        reservation, header, _ = self.reserved.pop(place)
        if keep:
            self.ram.let_go(self.ram.insert(reservation, header))
            if not save:
                self.unsaved.add(header.key)
        else:
            self.ram.abandon(reservation)

    @rule(number=NUMBERS, counts=st.booleans())
    def use(self, number: int, counts: bool) -> None:
        key = key_of(number)
        resident = self.ram.use(key) if counts else self.ram.hold(key)
        assert (resident is not None) == (key in self.ram)
        if resident is not None:
            self.used.append(resident)

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        if self.used:
            place = data.draw(st.integers(0, len(self.used) - 1))
            self.ram.let_go(self.used.pop(place))

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        assert self.ram.drop_key(key_of(number)) in (True, False)
        assert key_of(number) not in self.ram

    @rule(number=NUMBERS)
    def pin(self, number: int) -> None:
        if len(self.pinned) < 3:
            self.pinned.add(key_of(number))

    @rule()
    def unpin(self) -> None:
        self.pinned.clear()

    @rule(nbytes=st.integers(0, RAM_BYTES))
    def evict(self, nbytes: int) -> None:
        before = self.ram.used_bytes
        freed = self.ram.evict(nbytes)
        assert freed == before - self.ram.used_bytes

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.ram.drop_unused_for(50.0)

    @invariant()
    def spans_have_one_owner_each(self) -> None:
        self.ram.check()
        assert self.ram.num_uses == len(self.used) + len(self.reserved)

    @invariant()
    def what_is_used_is_not_overwritten(self) -> None:
        for resident in self.used:
            view = self.ram.arena.view(resident.span)
            number = view[-1]
            assert key_of(number) == resident.header.key
            assert bytes(view[128:]) == bytes([number]) * (len(view) - 128)

    def teardown(self) -> None:
        for resident in self.used:
            self.ram.let_go(resident)
        for reservation, _, _ in self.reserved:
            self.ram.abandon(reservation)
        self.ram.check()
        assert self.ram.num_uses == 0
        self.pinned.clear()
        self.ram.evict(2 * RAM_BYTES)
        assert self.ram.used_bytes == 0
        self.ram.arena.close()
        self.folder.cleanup()


TestAnyUseOfRam = AnyUseOfRam.TestCase
TestAnyUseOfRam.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def _ram(folder: Path, unsaved: set[bytes]) -> RamTier:
    return RamTier(
        Arena.create(folder / "ram.arena", 1 << 20),
        S3Fifo(),
        clock=lambda: 0.0,
        unsaved=unsaved.__contains__,
        pinned=lambda _key: False,
    )


def _insert(ram: RamTier, number: int) -> None:
    header = _header(number, 4096)
    reservation = ram.reserve(header.key, header.nbytes)
    assert reservation is not None
    ram.let_go(ram.insert(reservation, header))


def test_a_blob_that_is_nowhere_else_stays_while_others_can_leave(tmp_path: Path) -> None:
    unsaved = {key_of(number) for number in range(10)}
    ram = _ram(tmp_path, unsaved)
    for number in range(400):
        _insert(ram, number)
    assert all(key in ram for key in unsaved)
    assert ram.counts.lost_blobs == 0
    ram.arena.close()


def test_blobs_that_are_nowhere_else_leave_rather_than_refuse_new_ones(tmp_path: Path) -> None:
    everything = {key_of(number) for number in range(1000)}
    ram = _ram(tmp_path, everything)
    for number in range(400):
        _insert(ram, number)
    assert ram.counts.lost_blobs == ram.counts.evicted_blobs > MAX_SPARED
    ram.arena.close()
