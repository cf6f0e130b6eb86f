"""Write-back to a real disk tier that works, is full of work, or does not work."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.kvstore.arena import Arena
from services.kvstore.blob import BlobHeader, BlobKind, DamageReason, seal_into
from services.kvstore.blocking import Disk
from services.kvstore.disk import DiskConfig
from services.kvstore.lru import Lru
from services.kvstore.ram import RamTier, Resident
from services.kvstore.writeback import WriteBack, WriteBackLimits
from tests.services.kvstore.blobs import LAYOUT_DIGEST, MODEL_DIGEST, eventually, key_of


@pytest.fixture
def ram(tmp_path: Path) -> RamTier:
    return RamTier(
        Arena.create(tmp_path / "ram.arena", 1 << 20),
        Lru(),
        clock=lambda: 0.0,
        unsaved=lambda _key: False,
        pinned=lambda _key: False,
    )


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    config = DiskConfig(tmp_path / "disk", 16 << 20, probe_seconds=0.05)
    disk = await Disk.open(config, lambda _key: False)
    yield disk
    await disk.close()


def _insert(ram: RamTier, number: int) -> bytes:
    header = BlobHeader(
        kind=BlobKind.BODY,
        key=key_of(number),
        model_digest=MODEL_DIGEST,
        layout_digest=LAYOUT_DIGEST,
        start=0,
        end=128,
        payload_nbytes=1000,
    )
    reservation = ram.reserve(header.key, header.nbytes)
    assert reservation is not None
    seal_into(ram.arena.view(reservation.span), header, lambda view: None)
    ram.let_go(ram.insert(reservation, header))
    return header.key


def _write_back(disk: Disk, ram: RamTier, **limits: int) -> tuple[WriteBack, list[DamageReason]]:
    damages: list[DamageReason] = []

    def damaged(resident: Resident, reason: DamageReason) -> None:
        ram.drop(resident)
        damages.append(reason)

    return WriteBack(disk, ram, WriteBackLimits(**limits), damaged=damaged), damages


async def test_what_is_added_reaches_the_tier(disk: Disk, ram: RamTier) -> None:
    write_back, _ = _write_back(disk, ram)
    keys = [_insert(ram, number) for number in range(50)]
    for key in keys:
        write_back.add(key)
    assert write_back.may_save(keys[-1])
    await write_back.finished()
    assert all(map(disk.has, keys))
    assert not write_back.may_save(keys[-1])
    assert (write_back.counts.written_blobs, write_back.num_waiting) == (50, 0)
    assert ram.num_uses == 0
    await write_back.close()


async def test_the_oldest_are_dropped_when_too_many_wait(disk: Disk, ram: RamTier) -> None:
    write_back, _ = _write_back(disk, ram, waiting_blobs=10)
    keys = [_insert(ram, number) for number in range(30)]
    for key in keys:
        write_back.add(key)
    await write_back.finished()
    assert [disk.has(key) for key in keys] == [False] * 20 + [True] * 10
    assert write_back.counts.dropped_blobs == 20
    await write_back.close()


async def test_what_left_ram_before_its_turn_is_counted(disk: Disk, ram: RamTier) -> None:
    write_back, _ = _write_back(disk, ram)
    key = _insert(ram, 0)
    write_back.add(key)
    ram.drop_key(key)
    await write_back.finished()
    assert (write_back.counts.written_blobs, write_back.counts.dropped_blobs) == (0, 1)
    await write_back.close()


async def test_damage_goes_no_further(disk: Disk, ram: RamTier) -> None:
    write_back, damages = _write_back(disk, ram)
    key = _insert(ram, 0)
    resident = ram.hold(key)
    assert resident is not None
    ram.arena.view(resident.span)[500] ^= 1
    ram.let_go(resident)
    write_back.add(key)
    await write_back.finished()
    assert damages == [DamageReason.PAYLOAD_CHECKSUM]
    assert (disk.has(key), key in ram) == (False, False)
    await write_back.close()


async def test_a_tier_that_fails_is_waited_for(ram: RamTier, tmp_path: Path) -> None:
    place = tmp_path / "in-the-way"
    place.write_text("")
    disk = await Disk.open(DiskConfig(place, 16 << 20, probe_seconds=0.05), lambda _key: False)
    write_back, _ = _write_back(disk, ram)
    key = _insert(ram, 0)
    write_back.add(key)
    assert write_back.is_held_up
    assert not write_back.may_save(key)
    place.unlink()

    async def is_back() -> bool:
        await disk.tick()
        return not write_back.is_held_up

    await eventually(is_back)
    await write_back.finished()
    assert disk.has(key)
    await write_back.close()
    await disk.close()
