import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from services.kvstore.arena import (
    Arena,
    ArenaInUse,
    ArenaUnavailable,
    ArenaView,
    remove_dead_arenas,
)
from services.kvstore.spans import Span, StaleSpan

_WORKER = """
import sys
from pathlib import Path
from services.kvstore.arena import ArenaView
view = ArenaView.attach(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]))
span = view.view(int(sys.argv[3]), 5)
assert bytes(span) == b"hello", bytes(span)
span[:] = b"world"
"""
_STORE = """
import sys, time
from pathlib import Path
from services.kvstore.arena import Arena
arena = Arena.create(Path(sys.argv[1]), 1 << 20)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.arena"


def _allocated(arena: Arena, length: int) -> Span:
    span = arena.allocate(length)
    assert span is not None
    return span


def test_another_process_reads_and_writes_the_span_it_is_told_of(path: Path) -> None:
    arena = Arena.create(path, 1 << 20)
    span = _allocated(arena, 5)
    arena.view(span)[:] = b"hello"
    command = [sys.executable, "-c", _WORKER, str(path), arena.identity.hex(), str(span.offset)]
    subprocess.run(command, check=True)
    assert bytes(arena.view(span)) == b"world"
    arena.close()


def test_the_file_is_private_and_gone_when_closed(path: Path) -> None:
    arena = Arena.create(path, 100)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == os.sysconf("SC_PAGE_SIZE")
    arena.close()
    arena.close()
    assert not path.exists()


def test_the_whole_budget_can_be_handed_out(path: Path) -> None:
    arena = Arena.create(path, 4096)
    span = _allocated(arena, arena.capacity_bytes)
    assert (arena.capacity_bytes, arena.used_bytes) == (4032, 4032)
    assert arena.allocate(1) is None
    arena.view(span)[:] = b"x" * 4032
    arena.free(span)
    assert arena.used_bytes == 0
    arena.check()
    arena.close()


def test_a_freed_span_has_no_view(path: Path) -> None:
    arena = Arena.create(path, 4096)
    span = _allocated(arena, 10)
    arena.free(span)
    with pytest.raises(StaleSpan):
        arena.view(span)
    arena.close()


def test_a_view_outside_of_the_arena_is_refused(path: Path) -> None:
    arena = Arena.create(path, 4096)
    view = ArenaView.attach(path, arena.identity)
    for offset, length in [(0, 10), (64, 0), (64, 4033), (4096, 1), (-64, 10)]:
        with pytest.raises(ValueError, match="outside of the arena"):
            view.view(offset, length)
    arena.close()


def test_a_live_store_keeps_its_arena(path: Path) -> None:
    arena = Arena.create(path, 4096)
    with pytest.raises(ArenaInUse, match=r"a live store owns the arena .*node\.arena"):
        Arena.create(path, 4096)
    assert remove_dead_arenas(path.parent) == []
    ArenaView.attach(path, arena.identity)
    arena.close()


def test_the_arena_of_a_killed_store_is_replaced_or_removed(path: Path) -> None:
    def kill_a_store() -> bytes:
        with subprocess.Popen(
            [sys.executable, "-c", _STORE, path], stdout=subprocess.PIPE
        ) as store:
            assert store.stdout is not None
            assert store.stdout.readline() == b"ready\n"
            identity = path.read_bytes()[16:32]
            store.send_signal(signal.SIGKILL)
        return identity

    old_identity = kill_a_store()
    worker = ArenaView.attach(path, old_identity)
    arena = Arena.create(path, 4096)
    with pytest.raises(ArenaUnavailable, match="not the arena that the store speaks of"):
        ArenaView.attach(path, old_identity)
    worker.view(1 << 19, 10)[:] = b"0123456789"  # still mapped: no SIGBUS
    arena.close()
    kill_a_store()
    assert remove_dead_arenas(path.parent) == [path]
    assert not path.exists()


def test_what_is_not_an_arena_is_never_removed(path: Path) -> None:
    path.write_text("somebody's notes")
    with pytest.raises(ArenaUnavailable, match="it is not an arena"):
        Arena.create(path, 4096)
    assert remove_dead_arenas(path.parent) == []
    assert path.read_text() == "somebody's notes"
    path.unlink()
    path.mkdir()
    with pytest.raises(ArenaUnavailable, match="cannot replace"):
        Arena.create(path, 4096)


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    path.symlink_to(target)
    with pytest.raises(ArenaUnavailable):
        Arena.create(path, 4096)
    with pytest.raises(ArenaUnavailable):
        ArenaView.attach(path, bytes(16))
    assert target.read_bytes() == b""


def test_memory_that_cannot_be_had_is_an_error_at_the_start(path: Path) -> None:
    """A file size limit fails the reservation as a full /dev/shm does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ArenaUnavailable, match="cannot reserve 2097152 bytes"):
            Arena.create(path, 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not path.exists()
    with pytest.raises(ArenaUnavailable, match="No such file or directory"):
        Arena.create(path.parent / "missing" / "node.arena", 4096)


def test_a_view_that_is_held_outlives_the_close(path: Path) -> None:
    arena = Arena.create(path, 4096)
    span = _allocated(arena, 8)
    held = np.frombuffer(arena.view(span), dtype=np.uint8)
    held[:] = 7
    arena.close()
    assert held.tolist() == [7] * 8


def test_threads_never_get_overlapping_spans(path: Path) -> None:
    arena = Arena.create(path, 1 << 20)
    failures: list[str] = []

    def churn(mark: int) -> None:
        rng = np.random.default_rng(mark)
        held: list[Span] = []
        for _ in range(400):
            span = arena.allocate(int(rng.integers(1, 20_000)))
            if span is not None:
                arena.view(span)[:] = bytes([mark]) * span.length
                held.append(span)
            if span is None or rng.random() < 0.5:
                victim = held.pop(int(rng.integers(len(held)))) if held else None
                if victim is not None:
                    if bytes(arena.view(victim)) != bytes([mark]) * victim.length:
                        failures.append(f"{victim} of thread {mark} was overwritten")
                    arena.free(victim)
        for span in held:
            arena.free(span)

    threads = [threading.Thread(target=churn, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert arena.used_bytes == 0
    arena.check()
    arena.close()
