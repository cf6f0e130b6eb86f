import threading
from collections.abc import Iterator

import pytest

from services.kvstore.blob import HEADER_BYTES, Damaged, DamageReason
from services.kvstore.cold import MAX_BLOB_BYTES, PART_BYTES, ColdTier
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.sample_blobs import sample_blob, sample_key

PAYLOAD = 1000
BLOB = HEADER_BYTES + PAYLOAD
LARGE = 3 * PART_BYTES  # with the header: 4 parts


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def link(valkey: EmbeddedValkey) -> Iterator[RedisLink]:
    # Nothing here is about speed: a busy machine is not a slow server.
    config = RedisConfig(valkey.url, valkey.password, timeout_seconds=10.0, slow_seconds=10.0)
    link = RedisLink(config)
    yield link
    link.close()


def _tier(link: RedisLink, **changes: object) -> ColdTier:
    settings = {"max_bytes": 1 << 30, "ttl_seconds": 1000.0} | changes
    return ColdTier(link, **settings)  # type: ignore[arg-type]


def _put(tier: ColdTier, *numbers: int, payload: int = PAYLOAD) -> None:
    for number in numbers:
        assert tier.put(sample_key(number), sample_blob(number, payload))


def _get(tier: ColdTier, number: int) -> bytes | None:
    rooms: list[memoryview] = []

    def room(num_bytes: int) -> memoryview:
        rooms.append(memoryview(bytearray(num_bytes + 64)))
        return rooms[-1]

    header = tier.get_into(sample_key(number), room)
    if header is None:
        return None
    assert header.key == sample_key(number)
    return bytes(rooms[0][: header.nbytes])


def _held(tier: ColdTier) -> list[int]:
    return sorted(int.from_bytes(key, "big") for key in tier.keys())  # noqa: SIM118


def _part(number: int, part: int) -> str:
    return f"{{model1:{sample_key(number).hex()}}}:{part}"


@pytest.mark.parametrize(
    "payload", [0, 1, PART_BYTES - HEADER_BYTES, PART_BYTES - HEADER_BYTES + 1, LARGE]
)
def test_what_was_put_comes_back_to_any_node(link: RedisLink, payload: int) -> None:
    _put(_tier(link), 1, payload=payload)
    other_node = _tier(link)
    assert _get(other_node, 1) == bytes(sample_blob(1, payload))
    assert _get(other_node, 2) is None
    assert other_node.contains([sample_key(2), sample_key(1)]) == [False, True]


def test_parts_of_a_blob_lie_under_one_hash_tag_and_expire(link: RedisLink) -> None:
    tier = _tier(link, ttl_seconds=100.0)
    _put(tier, 1, payload=LARGE)
    parts = [_part(1, number) for number in range(4)]
    assert set(link.scan(b"{model1:*")) == {part.encode() for part in parts}
    lengths = link.batch([("STRLEN", part) for part in parts], writes=False)
    assert lengths == [PART_BYTES] * 3 + [HEADER_BYTES]
    ttls = link.batch([("PTTL", part) for part in parts], writes=False)
    assert all(99_000 < ttl <= 100_000 for ttl in ttls)


def test_contains_asks_for_any_number_of_keys(link: RedisLink) -> None:
    tier = _tier(link)
    _put(tier, 600)
    assert tier.contains([]) == []
    assert tier.contains([sample_key(n) for n in range(1100)]) == [n == 600 for n in range(1100)]


def test_a_second_put_of_a_key_writes_nothing(link: RedisLink) -> None:
    tier = _tier(link)
    _put(tier, 1, payload=LARGE)
    written = int(link.call("INFO", "stats", writes=False)["total_net_input_bytes"])
    _put(tier, 1, payload=LARGE)
    assert int(link.call("INFO", "stats", writes=False)["total_net_input_bytes"]) < written + 4096
    assert tier.used_bytes == HEADER_BYTES + LARGE


def test_a_damaged_blob_is_not_written(link: RedisLink) -> None:
    tier = _tier(link)
    blob = sample_blob(1)
    blob[500] ^= 1
    with pytest.raises(Damaged):
        tier.put(sample_key(1), blob)
    with pytest.raises(Damaged):
        tier.put(sample_key(2), sample_blob(1))
    assert tier.keys() == []


def test_a_blob_larger_than_the_budget_is_refused(link: RedisLink) -> None:
    assert not _tier(link, max_bytes=BLOB - 1).put(sample_key(1), sample_blob(1))
    tier = _tier(link)
    assert not tier.put(sample_key(1), sample_blob(1, MAX_BLOB_BYTES))
    assert tier.counts.refused_blobs == 1
    assert tier.degraded is None


def test_what_room_raises_comes_out(link: RedisLink) -> None:
    tier = _tier(link)
    _put(tier, 1)

    def no_room(num_bytes: int) -> memoryview:
        raise MemoryError(num_bytes)

    with pytest.raises(MemoryError, match=str(BLOB)):
        tier.get_into(sample_key(1), no_room)
    assert _get(tier, 1) is not None
    assert tier.degraded is None


# Room


def test_the_budget_holds_for_all_nodes_and_the_longest_unused_go(link: RedisLink) -> None:
    clock = Clock()
    one, two = (_tier(link, max_bytes=10 * BLOB, clock=clock) for _ in range(2))
    for number in range(30):
        clock.now += 1
        _put((one, two)[number % 2], number)
        assert len(one.keys()) <= 10
        if number == 12:
            assert _get(one, 5) is not None
            one.tick()
    assert _held(one) == list(range(20, 30))
    two.tick()
    assert (two.num_blobs, two.used_bytes) == (10, 10 * BLOB)
    assert one.counts.evicted_blobs + two.counts.evicted_blobs == 20
    assert sorted(link.scan(b"{model1:*")) == sorted(_part(n, 0).encode() for n in range(20, 30))


def test_a_blob_that_is_read_stays(link: RedisLink) -> None:
    clock = Clock()
    tier = _tier(link, max_bytes=10 * BLOB, clock=clock)
    for number in range(30):
        clock.now += 1
        _put(tier, number)
        assert _get(tier, 0) is not None
        tier.tick()
    assert _held(tier) == [0, *range(21, 30)]


def test_pinned_blobs_are_spared_while_others_can_go(link: RedisLink) -> None:
    clock = Clock()
    pinned = {sample_key(n) for n in range(3)}
    tier = _tier(link, max_bytes=5 * BLOB, clock=clock, is_pinned=pinned.__contains__)
    for number in range(20):
        clock.now += 1
        _put(tier, number)
    assert _held(tier) == [0, 1, 2, 18, 19]
    pinned.update(sample_key(n) for n in range(30))
    clock.now += 1
    _put(tier, 20)
    assert _held(tier) == [1, 2, 18, 19, 20]


def test_use_prolongs_the_life_of_a_blob_and_what_expired_is_forgotten(link: RedisLink) -> None:
    clock = Clock()
    tier = _tier(link, ttl_seconds=100.0, clock=clock)
    _put(tier, 1, 2)
    clock.now += 60
    assert _get(tier, 1) is not None
    tier.tick()
    clock.now += 60
    tier.tick()
    assert _held(tier) == [1]
    assert (tier.num_blobs, tier.used_bytes) == (1, BLOB)


def test_evict_and_delete_say_what_they_freed(link: RedisLink) -> None:
    clock = Clock()
    tier = _tier(link, clock=clock, is_pinned=lambda key: True)
    for number in range(6):
        clock.now += 1
        _put(tier, number)
    assert tier.evict(BLOB + 1) == 2 * BLOB
    assert _held(tier) == [2, 3, 4, 5]
    assert tier.delete([sample_key(3), sample_key(0)]) == 1
    assert tier.evict(1 << 40) == 3 * BLOB
    assert (tier.keys(), tier.used_bytes, tier.evict(1)) == ([], 0, 0)
    assert list(link.scan(b"{model1:*")) == []


def test_a_sum_that_is_off_is_counted_again(link: RedisLink) -> None:
    tier = _tier(link)
    _put(tier, 1)
    link.call("SET", "model1:{blobs}:bytes", 12345678, writes=True)
    tier.tick()
    assert tier.used_bytes == BLOB


def test_threads_share_a_tier(link: RedisLink) -> None:
    tier = _tier(link, max_bytes=40 * BLOB)
    failures: list[str] = []

    def churn(base: int) -> None:
        for number in range(base, base + 40):
            if not tier.put(sample_key(number), sample_blob(number)):
                failures.append(f"{number} refused")
            found = _get(tier, number - number % 7)
            if found not in (None, bytes(sample_blob(number - number % 7))):
                failures.append("other bytes")

    threads = [threading.Thread(target=churn, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tier.tick()
    assert failures == []
    assert tier.degraded is None
    assert tier.used_bytes == tier.num_blobs * BLOB <= 40 * BLOB


# Damage


def _damage(link: RedisLink, part: str, at: int) -> None:
    byte = link.call("GETRANGE", part, at, at, writes=False)[0]
    link.call("SETRANGE", part, at, bytes([byte ^ 0x10]), writes=True)


@pytest.mark.parametrize(
    ("part", "at", "reason"),
    [
        (0, 0, DamageReason.MAGIC),
        (0, 24, DamageReason.HEADER_CHECKSUM),
        (0, HEADER_BYTES, DamageReason.PAYLOAD_CHECKSUM),
        (2, 1234, DamageReason.PAYLOAD_CHECKSUM),
        (3, HEADER_BYTES - 1, DamageReason.PAYLOAD_CHECKSUM),
    ],
)
def test_a_flipped_bit_is_found_and_the_blob_dropped(
    link: RedisLink, part: int, at: int, reason: DamageReason
) -> None:
    tier = _tier(link)
    _put(tier, 1, payload=LARGE)
    _damage(link, _part(1, part), at)
    with pytest.raises(Damaged) as caught:
        _get(tier, 1)
    assert caught.value.reason is reason
    assert _get(tier, 1) is None
    assert list(link.scan(b"{model1:*")) == []
    assert tier.used_bytes == 0
    _put(tier, 1, payload=LARGE)
    assert _get(tier, 1) == bytes(sample_blob(1, LARGE))


def test_parts_that_are_cut_swapped_or_of_another_blob_are_found(link: RedisLink) -> None:
    tier = _tier(link)
    _put(tier, *range(5), payload=LARGE)
    link.call("SET", _part(0, 1), b"short", writes=True)
    link.call("RENAME", _part(1, 1), "kept", writes=True)
    link.call("RENAME", _part(1, 2), _part(1, 1), writes=True)
    link.call("RENAME", "kept", _part(1, 2), writes=True)
    link.call("COPY", _part(3, 1), _part(2, 1), "REPLACE", writes=True)
    for part in range(4):
        link.call("COPY", _part(4, part), _part(3, part), "REPLACE", writes=True)
    report = tier.verify(repair=False)
    assert report.num_blobs == 5
    assert dict(report.damaged) == {
        DamageReason.TRUNCATED: 1,
        DamageReason.PAYLOAD_CHECKSUM: 2,
        DamageReason.KEY: 1,
    }
    assert tier.verify(repair=True) == report
    assert tier.verify(repair=True).damaged == {}
    assert _held(tier) == [4]


@pytest.mark.parametrize("part", range(4))
def test_a_part_that_the_server_dropped_makes_a_miss(link: RedisLink, part: int) -> None:
    tier = _tier(link)
    _put(tier, 1, payload=LARGE)
    link.call("DEL", _part(1, part), writes=True)
    assert _get(tier, 1) is None
    assert tier.counts.incomplete_blobs == (part > 0)
    _put(tier, 1, payload=LARGE)
    assert _get(tier, 1) == bytes(sample_blob(1, LARGE))
    assert tier.used_bytes == HEADER_BYTES + LARGE


def test_a_server_that_evicts_by_itself_costs_only_misses(link: RedisLink) -> None:
    """maxmemory of the embedded server is 96 MiB; the tier believes that it has 1 GiB."""
    tier = _tier(link)
    _put(tier, *range(130), payload=LARGE)
    found = [_get(tier, number) for number in range(130)]
    assert all(
        blob in (None, bytes(sample_blob(number, LARGE))) for number, blob in enumerate(found)
    )
    assert 0 < sum(blob is not None for blob in found) < 130
    assert tier.degraded is None
