"""What a store answers its peers, from a tier that answers when the test says so."""

import asyncio
import time
from pathlib import Path

import pytest

from protos import kvstore_pb2
from services.kvstore import attached_peer
from services.kvstore.arena import Arena
from services.kvstore.attached_peer import MAX_FETCHES, AttachedPeer
from services.kvstore.lru import Lru
from services.kvstore.pins import Pins
from services.kvstore.store import StoreLimits, TieredStore
from services.kvstore.tier import Below
from tests.services.kvstore.gated_tier import GatedTier
from tests.services.kvstore.sample_blobs import sample_key


async def test_a_fetch_that_waited_for_longer_than_its_peer_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_peer, "LOAD_TIMEOUT_SECONDS", 0.1)
    tier = GatedTier()
    store = TieredStore(
        Arena.create(tmp_path / "ram.arena", 1 << 20),
        Lru(),
        Below(peers=tier),
        Pins(time.time),
        StoreLimits(),
        clock=time.monotonic,
    )
    peer = AttachedPeer(store)
    num_fetches = MAX_FETCHES + 5
    for number in range(num_fetches):
        peer.receive(kvstore_pb2.PeerRequest(call_id=number + 1, fetch=sample_key(number)))
    async with asyncio.timeout(5):
        answers = [await peer.outbox.get() for _ in range(num_fetches)]
    assert {answer.call_id for answer in answers} == set(range(1, num_fetches + 1))
    assert all(list(answer.absent.indexes) == [0] for answer in answers)
    assert len(tier.asked) == MAX_FETCHES
    peer.abandon()
    await store.close()
    store.ram.arena.close()
