"""The session table: versions, restarts, and disks that fail."""

import os
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvstore import sessions
from services.kvstore.session_rows import Durability
from services.kvstore.sessions import FILE_NAME, RecordsFull, RecordsUnreadable, SessionTable
from services.session_record import SessionHead, SessionName, SessionRecord

TEA = SessionName("tea", "")


def record(
    version: int,
    token_ids: tuple[int, ...] = (5, 6, 7),
    *,
    name: SessionName = TEA,
    last_used_s: float = 1.0,
    is_deleted: bool = False,
) -> SessionRecord:
    head = SessionHead(
        name=name,
        version=version,
        num_tokens=len(token_ids),
        last_used_s=last_used_s,
        is_deleted=is_deleted,
    )
    return SessionRecord(head, token_ids)


@contextmanager
def table(directory: Path | None) -> Iterator[SessionTable]:
    opened = SessionTable(directory)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_last_version_wins_and_an_old_one_is_refused(on_disk: bool, tmp_path: Path) -> None:
    with table(tmp_path if on_disk else None) as sessions_:
        assert sessions_.get(TEA) is None
        assert sessions_.put(record(1), 0) == (True, 1)
        assert sessions_.put(record(2, (5, 6, 7, 8)), 1) == (True, 2)
        assert sessions_.put(record(2, (9,)), 1) == (False, 2)
        assert sessions_.get(TEA) == record(2, (5, 6, 7, 8))


def test_a_store_that_missed_versions_catches_up(tmp_path: Path) -> None:
    with table(tmp_path) as sessions_:
        sessions_.put(record(1), 0)
        assert sessions_.put(record(7), 6) == (True, 7)
        assert sessions_.get(TEA) == record(7)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12),
    on_disk=st.booleans(),
)
def test_a_put_is_accepted_exactly_if_nothing_newer_is_there(
    steps: list[tuple[int, bool]], on_disk: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("t") if on_disk else None
    known = 0
    with table(directory) as sessions_:
        for expected, is_deleted in steps:
            wanted = record(expected + 1, (expected,), is_deleted=is_deleted)
            is_accepted, version = sessions_.put(wanted, expected)
            assert is_accepted == (known <= expected)
            if is_accepted:
                known = expected + 1
                assert sessions_.get(TEA) == wanted
            assert version == known


def test_records_outlive_the_process_however_it_ends(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from services.kvstore.sessions import SessionTable\n"
        "from tests.services.kvstore.test_sessions import record\n"
        "table = SessionTable(Path(sys.argv[1]))\n"
        "for version in range(1, 21): table.put(record(version, (version,)), version - 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[3]
    died = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root)
    assert died.returncode == -9
    with table(tmp_path) as sessions_:
        assert sessions_.get(TEA) == record(20, (20,))
        assert not sessions_.degraded


def test_salts_are_apart_and_not_on_disk(tmp_path: Path) -> None:
    mine, yours = SessionName("tea", "my-secret"), SessionName("tea", "your-secret")
    with table(tmp_path) as sessions_:
        sessions_.put(record(1, (5,), name=mine), 0)
        sessions_.put(record(1, (6,), name=yours), 0)
        assert sessions_.get(mine) == record(1, (5,), name=mine)
        assert sessions_.get(TEA) is None
        assert [head.name for head in sessions_.heads("your-secret", 10)] == [yours]
    files = list(tmp_path.iterdir())
    assert files
    for file in files:
        assert b"secret" not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_last_used_come_first(on_disk: bool, tmp_path: Path) -> None:
    with table(tmp_path if on_disk else None) as sessions_:
        for i in range(5):
            name = SessionName(f"s{i}", "")
            sessions_.put(record(1, name=name, last_used_s=float(i)), 0)
        assert [head.name.session_id for head in sessions_.heads("", 3)] == ["s4", "s3", "s2"]


def test_a_damaged_record_is_never_given_out_and_can_be_written_over(tmp_path: Path) -> None:
    with table(tmp_path) as sessions_:
        sessions_.put(record(3), 2)
    with sqlite3.connect(tmp_path / FILE_NAME) as rows:
        rows.execute("UPDATE sessions SET token_ids = ?", (bytes(12),))
    rows.close()
    with table(tmp_path) as sessions_:
        with pytest.raises(RecordsUnreadable, match="'tea' is damaged"):
            sessions_.get(TEA)
        assert sessions_.num_damaged == 1
        assert sessions_.put(record(2), 1) == (False, 3)
        assert sessions_.put(record(4), 3) == (True, 4)
        assert sessions_.get(TEA) == record(4)


@pytest.mark.parametrize("head", [b"not a message", b""])
def test_a_damaged_record_does_not_hide_the_others(head: bytes, tmp_path: Path) -> None:
    with table(tmp_path) as sessions_:
        sessions_.put(record(1), 0)
        sessions_.put(record(1, name=SessionName("other", "")), 0)
    with sqlite3.connect(tmp_path / FILE_NAME) as rows:
        rows.execute("UPDATE sessions SET head = ? WHERE session_id = 'tea'", (head,))
    rows.close()
    with table(tmp_path) as sessions_:
        assert [head.name.session_id for head in sessions_.heads("", 10)] == ["other"]


def test_a_file_that_is_no_database_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 1000)
    with table(tmp_path) as sessions_:
        assert not sessions_.degraded
        assert sessions_.put(record(1), 0) == (True, 1)
    assert (tmp_path / "sessions.damaged").exists()


def test_what_a_full_disk_refuses_is_held_and_written_when_there_is_room(tmp_path: Path) -> None:
    long = tuple(range(200_000))
    with table(tmp_path) as sessions_:
        sessions_.put(record(1), 0)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # Python ignores SIGXFSZ
        try:
            assert sessions_.put(record(2, long), 1) == (True, 2)
            assert sessions_.degraded
            sessions_.tick()
            assert (sessions_.num_held, sessions_.get(TEA)) == (1, record(2, long))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sessions_.tick()
        assert sessions_.num_held == 0
        assert not sessions_.degraded
    with table(tmp_path) as sessions_:
        assert sessions_.get(TEA) == record(2, long)


def test_without_a_disk_to_open_nobody_knows_what_is_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with table(folder) as sessions_:
        assert sessions_.degraded
        with pytest.raises(RecordsUnreadable):
            sessions_.get(TEA)
        os.mkdir(folder)
        sessions_.tick()
        assert sessions_.put(record(1), 0) == (True, 1)
        assert sessions_.get(TEA) == record(1)


def test_a_folder_that_takes_no_file_leaves_memory(tmp_path: Path) -> None:
    (tmp_path / "sessions.db-wal").mkdir()  # SQLite cannot begin here, whoever asks
    with table(tmp_path) as sessions_:
        (tmp_path / FILE_NAME).unlink(missing_ok=True)
        assert sessions_.degraded
        assert sessions_.put(record(1), 0) == (True, 1)
        assert sessions_.get(TEA) == record(1)
        (tmp_path / "sessions.db-wal").rmdir()
        sessions_.tick()
        assert sessions_.num_held == 0
        assert not sessions_.degraded


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_a_deleted_session_left_is_forgotten_in_time(on_disk: bool, tmp_path: Path) -> None:
    now = [1e9]
    opened = SessionTable(tmp_path if on_disk else None, clock=lambda: now[0])
    opened.put(record(1, last_used_s=now[0], name=SessionName("kept", "")), 0)
    opened.put(record(2, (), last_used_s=now[0], is_deleted=True), 1)
    opened.tick()
    assert opened.get(TEA) is not None
    now[0] += sessions.TOMBSTONE_SECONDS + 1
    opened.tick()
    assert opened.get(TEA) is None
    assert [head.name.session_id for head in opened.heads("", 10)] == ["kept"]
    opened.close()


def test_memory_holds_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_HELD_BYTES", 40)
    with table(None) as sessions_:
        sessions_.put(record(1, tuple(range(8))), 0)
        assert sessions_.put(record(2, tuple(range(9))), 1) == (True, 2)  # in place of the first
        with pytest.raises(RecordsFull):
            sessions_.put(record(1, (1, 2), name=SessionName("other", "")), 0)


@pytest.mark.parametrize("durability", list(Durability))
def test_every_durability_keeps_records(durability: Durability, tmp_path: Path) -> None:
    opened = SessionTable(tmp_path, durability)
    opened.put(record(1), 0)
    opened.close()
    with table(tmp_path) as sessions_:
        assert sessions_.get(TEA) == record(1)
