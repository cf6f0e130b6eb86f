import threading
from collections.abc import Iterator

import pytest

from services.kvstore.cold_records import MAX_RECORD_BYTES, ColdRecords, Record
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.valkey import EmbeddedValkey


@pytest.fixture
def link(valkey: EmbeddedValkey) -> Iterator[RedisLink]:
    config = RedisConfig(valkey.url, valkey.password, timeout_seconds=10.0, slow_seconds=10.0)
    link = RedisLink(config)
    yield link
    link.close()


@pytest.fixture
def records(link: RedisLink) -> ColdRecords:
    return ColdRecords(link, ttl_seconds=100.0)


def test_the_expected_version_decides_who_writes(records: ColdRecords) -> None:
    assert records.get_record("a") is None
    assert not records.put_record("a", b"", 1, 2)
    assert records.put_record("a", b"first", 0, 1)
    assert not records.put_record("a", b"again", 0, 1)
    assert records.put_record("a", b"", 1, 5)
    assert records.get_record("a") == Record(5, b"")
    assert not records.put_record("a", b"late", 1, 6)
    assert records.put_record("b", b"\0binary\xff", 0, 2**63)
    assert records.get_record("b") == Record(2**63, b"\0binary\xff")
    assert records.names() == ["a", "b"]


def test_one_of_many_writers_wins_each_version(records: ColdRecords) -> None:
    written: list[int] = []

    def write(writer: int) -> None:
        for _ in range(25):
            there = records.get_record("a")
            version = 0 if there is None else there.version
            if records.put_record("a", b"%d" % writer, version, version + 1):
                written.append(version + 1)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = records.get_record("a")
    assert last is not None
    assert sorted(written) == list(range(1, last.version + 1))


def test_a_record_lives_from_its_last_write(records: ColdRecords, link: RedisLink) -> None:
    records.put_record("a", b"x", 0, 1)
    assert 99_000 < link.call("PTTL", "model1:record:{a}", writes=False) <= 100_000


def test_what_is_no_record_is_none(records: ColdRecords, link: RedisLink) -> None:
    link.call("SET", "model1:record:{a}", b"short", writes=True)
    assert records.get_record("a") is None


def test_what_no_record_can_be_is_refused(records: ColdRecords) -> None:
    with pytest.raises(ValueError, match="version 1 cannot follow 1"):
        records.put_record("a", b"", 1, 1)
    with pytest.raises(ValueError, match="are the most"):
        records.put_record("a", bytes(MAX_RECORD_BYTES + 1), 0, 1)


def test_without_a_server_there_is_nothing_and_nothing_is_kept() -> None:
    link = RedisLink(RedisConfig("redis://127.0.0.1:1"))
    records = ColdRecords(link, ttl_seconds=1.0)
    assert records.get_record("a") is None
    assert not records.put_record("a", b"", 0, 1)
    assert records.names() == []
    link.close()
