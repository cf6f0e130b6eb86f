"""A node's RAM tier: one file of shared memory that the store hands out in spans.

The store owns the file and says which span holds what. The workers of the node map the same file;
they read and write the spans they were told of, so that no block is copied through a socket. All
pages are reserved when the file is created: a full /dev/shm is an error at the start, and never a
SIGBUS in a worker. Knows nothing of blobs, keys or eviction.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import threading
from pathlib import Path

from services.kvstore.spans import GRANULE_BYTES, Span, SpanAllocator

IDENTITY_BYTES = 16
FILE_SUFFIX = ".arena"

# The first granule of the file: magic, file length, identity. Spans come after it.
_FILE_HEADER = struct.Struct(f"<8sQ{IDENTITY_BYTES}s")
_MAGIC = b"MODEL1AR"
# Mapped at once, 0.1 s a GiB: page by page, a span's first write ran at 2 instead of 15 GB/s.
_MAP = mmap.MAP_SHARED | mmap.MAP_POPULATE
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class ArenaUnavailable(RuntimeError):
    """The arena's file cannot be created or mapped: the reason is in the message."""


class ArenaInUse(ArenaUnavailable):
    """A live store owns the file."""


class ArenaView:
    """A worker's mapping of its node's arena. Offsets and lengths come from the store."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._memory = memoryview(mapping)

    @classmethod
    def attach(cls, path: Path, identity: bytes) -> ArenaView:
        """Map the arena that the store calls `identity`; raises ArenaUnavailable."""
        try:
            descriptor = os.open(path, _OPEN)
        except OSError as error:
            raise ArenaUnavailable(f"cannot open the arena {path}: {error.strerror}") from error
        try:
            num_bytes = os.fstat(descriptor).st_size
            if num_bytes < GRANULE_BYTES:
                raise ArenaUnavailable(f"{path} is no arena")
            mapping = mmap.mmap(descriptor, num_bytes, flags=_MAP)
        finally:
            os.close(descriptor)
        if mapping[: _FILE_HEADER.size] != _FILE_HEADER.pack(_MAGIC, num_bytes, identity):
            mapping.close()
            raise ArenaUnavailable(f"{path} is not the arena that the store speaks of")
        return cls(mapping)

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes [offset, offset + length), writable; they are the store's to give and take."""
        end = offset + length
        if offset < GRANULE_BYTES or length <= 0 or end > len(self._memory):
            raise ValueError(f"[{offset}, {end}) is outside of the arena")
        return self._memory[offset:end]

    def close(self) -> None:
        """Unmap. Views that are still held keep the memory mapped until they are dropped."""
        self._memory.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()


class Arena:
    """The store's end: owner of the file, and of which spans of it are taken. Thread-safe."""

    def __init__(self, path: Path, descriptor: int, mapping: mmap.mmap, identity: bytes) -> None:
        self.path = path
        self.identity = identity
        self._descriptor = descriptor  # holds the lock that says the file's owner is alive
        self._view = ArenaView(mapping)
        self._spans = SpanAllocator(GRANULE_BYTES, len(mapping))
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def create(cls, path: Path, num_bytes: int) -> Arena:
        """A new arena of `num_bytes` (rounded up to whole pages) at `path`, mode 0600.

        The file of a store that died is replaced; workers that map it still keep their memory.
        Raises ArenaInUse, and ArenaUnavailable when the memory cannot be had.
        """
        if num_bytes <= 0:
            raise ValueError(f"an arena of {num_bytes} bytes")
        num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        _remove_if_dead(path)
        try:
            descriptor = os.open(path, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise ArenaInUse(f"another store is creating the arena {path}") from error
        except OSError as error:
            raise ArenaUnavailable(f"cannot create the arena {path}: {error.strerror}") from error
        try:
            if not _lock(descriptor, path):
                raise ArenaInUse(f"another store took the arena {path}")
            os.posix_fallocate(descriptor, 0, num_bytes)
            mapping = mmap.mmap(descriptor, num_bytes, flags=_MAP)
        except ArenaInUse:
            os.close(descriptor)
            raise
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise ArenaUnavailable(
                f"cannot reserve {num_bytes} bytes for the arena {path}: {error.strerror}"
            ) from error
        identity = secrets.token_bytes(IDENTITY_BYTES)
        mapping[: _FILE_HEADER.size] = _FILE_HEADER.pack(_MAGIC, num_bytes, identity)
        return cls(path, descriptor, mapping, identity)

    @property
    def capacity_bytes(self) -> int:
        with self._lock:
            return self._spans.used_bytes + self._spans.free_bytes

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._spans.used_bytes

    def allocate(self, length: int) -> Span | None:
        """Room for `length` bytes, aligned to 64, or None: evict and ask again."""
        with self._lock:
            return self._spans.allocate(length)

    def free(self, span: Span) -> None:
        """Give the room back; raises StaleSpan. Nobody may use a view of it afterwards."""
        with self._lock:
            self._spans.free(span)

    def view(self, span: Span) -> memoryview:
        """The bytes of a live span, writable; raises StaleSpan."""
        with self._lock:
            self._spans.require_live(span)
        return self._view.view(span.offset, span.length)

    def check(self) -> None:
        with self._lock:
            self._spans.check()

    def close(self) -> None:
        """Remove the file. Workers that map it keep their memory until they let go. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.path.unlink(missing_ok=True)
        self._view.close()
        os.close(self._descriptor)


def remove_dead_arenas(directory: Path) -> list[Path]:
    """Give back the memory of stores that were killed: removes the arenas that nobody owns."""
    removed = []
    for path in sorted(directory.glob(f"*{FILE_SUFFIX}")):
        with contextlib.suppress(ArenaUnavailable):
            if _remove_if_dead(path):
                removed.append(path)
    return removed


def _remove_if_dead(path: Path) -> bool:
    """Remove the file of a dead store; raises ArenaInUse, and ArenaUnavailable if it is none."""
    try:
        descriptor = os.open(path, _OPEN)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ArenaUnavailable(f"cannot replace {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArenaUnavailable(f"cannot replace {path}: it is not a file")
        if not _lock(descriptor, path):
            raise ArenaInUse(f"a live store owns the arena {path}")
        # A store that died between creating the file and writing its header left none.
        magic = os.pread(descriptor, len(_MAGIC), 0)
        if magic.strip(b"\0") and magic != _MAGIC:
            raise ArenaUnavailable(f"cannot replace {path}: it is not an arena")
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether this process now is the only one that may replace the file at `path`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and the lock another store may have replaced the file, and be done.
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except (BlockingIOError, FileNotFoundError):
        return False
