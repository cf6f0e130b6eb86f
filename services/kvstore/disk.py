"""A node's disk tier: blobs that outlive the process, and a disk that may fail.

A disk that fails is a tier without hits: it refuses blobs, says why, and is probed until it works
again. Everything read is verified. Thread-safe; every call may block on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from services.kvstore.blob import BlobHeader, Damaged, DamageReason, VerifyReport, check_blob
from services.kvstore.segment import record_nbytes
from services.kvstore.segment_index import Entry
from services.kvstore.segment_log import DiskInUse, SegmentLog

__all__ = ["DiskConfig", "DiskCounts", "DiskInUse", "DiskTier", "FsyncPolicy", "VerifyReport"]

log = logging.getLogger(__name__)

_MIN_PROBE_BYTES = 4096
_MAX_PROBE_BYTES = 4 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class FsyncPolicy(StrEnum):
    NEVER = "never"  # the kernel writes when it likes; a loss of power costs recent blobs
    INTERVAL = "interval"
    ALWAYS = "always"  # a put that returned True survives a loss of power


@dataclass(frozen=True, slots=True)
class DiskConfig:
    directory: Path
    max_bytes: int
    segment_bytes: int = 64 << 20
    fsync: FsyncPolicy = FsyncPolicy.INTERVAL
    fsync_interval_seconds: float = 1.0
    probe_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.max_bytes <= 0 or self.segment_bytes <= 0:
            raise ValueError("a disk tier needs max_bytes and segment_bytes above 0")


@dataclass(slots=True)
class DiskCounts:
    """Since the tier was built, but for the scan: the latest one."""

    scanned_blobs: int = 0
    scan_seconds: float = 0.0
    cut_bytes: int = 0  # of ends that a crash tore
    evicted_blobs: int = 0
    evicted_bytes: int = 0
    kept_blobs: int = 0  # moved to the newest segment when theirs was dropped
    refused_blobs: int = 0  # put while degraded, or too large
    failures: Counter[str] = field(default_factory=Counter)  # "write ENOSPC" -> times


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why the tier is degraded. A failed read stops reads too: each could take long to fail."""

    operation: str
    error: OSError
    probe_bytes: int
    probe_at: float

    def __str__(self) -> str:
        return f"{self.operation} {_code(self.error)}: {self.error.strerror}"


class DiskTier:
    """The blobs of one directory.

    `is_pinned` says of a key whether eviction should spare it; it is called with a lock held and
    must not call back. Raises DiskInUse; a directory that cannot be used for another reason makes a
    degraded tier.
    """

    def __init__(
        self,
        config: DiskConfig,
        *,
        is_pinned: Callable[[bytes], bool] = lambda key: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._log = SegmentLog(
            config.directory,
            max_bytes=config.max_bytes,
            segment_bytes=config.segment_bytes,
            syncs=config.fsync is not FsyncPolicy.NEVER,
            is_pinned=is_pinned,
        )
        self._write_lock = threading.Lock()  # held by the one who writes
        self._lock = threading.Lock()  # guards the two below
        self._counts = DiskCounts()
        self._fault: _Fault | None = None
        self._sync_due_at = clock() + config.fsync_interval_seconds
        try:
            self._open()
        except OSError as error:
            self._degrade("open", error)

    @property
    def degraded(self) -> str | None:
        """Why blobs are refused now, or None."""
        fault = self._fault
        return None if fault is None else str(fault)

    @property
    def num_blobs(self) -> int:
        return len(self._log)

    @property
    def used_bytes(self) -> int:
        """Of the segments, with padding and what is dead in them."""
        return self._log.used_bytes

    @property
    def counts(self) -> DiskCounts:
        """A copy."""
        evictions = self._log.evictions
        with self._lock:
            return dataclasses.replace(
                self._counts,
                evicted_blobs=evictions.num_blobs,
                evicted_bytes=evictions.num_bytes,
                kept_blobs=evictions.num_kept,
                failures=Counter(self._counts.failures),
            )

    def keys(self) -> list[bytes]:
        """Of every blob, roughly from the oldest to the newest."""
        return self._log.keys()

    def nbytes_of(self, key: bytes) -> int | None:
        """Length of the blob, or None when a read would not find it."""
        entry = self._find(key)
        return None if entry is None else entry.nbytes

    def put(self, key: bytes, blob: memoryview) -> bool:
        """Append the blob at the start of `blob`; whether the tier holds it now.

        Raises Damaged, storing nothing, unless it verifies as the blob of `key`.
        """
        if self._fault is not None:  # without waiting for whoever probes the disk
            return self._refuse()
        blob = blob[: check_blob(blob, key).nbytes]
        with self._write_lock:
            if self._log.find(key) is not None:
                return True
            num_bytes = record_nbytes(len(blob))
            if self._fault is not None or num_bytes > self._config.max_bytes:
                return self._refuse()
            try:
                self._log.append(key, blob)
                if self._config.fsync is FsyncPolicy.ALWAYS:
                    self._log.sync()
            except OSError as error:
                self._degrade("write", error, num_bytes)
                if error.errno in _NO_ROOM:
                    self._shrink()
                return self._refuse()
        return True

    def get_into(self, key: bytes, out: memoryview) -> BlobHeader | None:
        """Read the blob of `key` into the start of `out`, verified; None when there is none.

        Raises Damaged, and has forgotten the blob, when it does not verify; ValueError when `out`
        is shorter than `nbytes_of(key)`.
        """
        entry = self._find(key)
        if entry is None:
            return None
        header = self._read(key, entry, out, forget_damaged=True)
        entry.was_read = True
        return header

    def delete(self, key: bytes) -> bool:
        """Forget a blob and overwrite it; whether that was done.

        False also when the disk failed: then a later scan finds the blob again.
        """
        with self._write_lock:
            try:
                return self._log.erase(key)
            except OSError as error:
                self._degrade("erase", error)
                return False

    def verify(self, *, repair: bool) -> VerifyReport:
        """Read and check every blob; forget the damaged ones when told to repair."""
        damaged: Counter[DamageReason] = Counter()
        num_blobs = 0
        scratch = memoryview(bytearray())
        for key in self.keys():
            entry = self._find(key)
            if entry is None:
                continue
            if len(scratch) < entry.nbytes:
                scratch = memoryview(bytearray(entry.nbytes))
            num_blobs += 1
            try:
                self._read(key, entry, scratch, forget_damaged=repair)
            except Damaged as error:
                damaged[error.reason] += 1
        return VerifyReport(num_blobs, damaged)

    def evict(self, num_bytes: int) -> int:
        """Drop oldest segments, pinned or not, until `num_bytes` are free; returns the bytes."""
        freed = 0
        with self._write_lock:
            try:
                while freed < num_bytes and self._log.used_bytes:
                    freed += self._log.drop_oldest()
            except OSError as error:
                self._degrade("evict", error)
        return freed

    def flush(self) -> None:
        """Return when every blob that was put survives a loss of power, or the tier is degraded."""
        with self._write_lock:
            self._sync()

    def tick(self) -> None:
        """To be called about once a second: probes a degraded disk, syncs at the interval."""
        with self._write_lock:
            now = self._clock()
            if self._fault is not None:
                if now >= self._fault.probe_at:
                    self._probe(self._fault)
            elif self._config.fsync is FsyncPolicy.INTERVAL and now >= self._sync_due_at:
                self._sync()

    def check(self) -> None:
        self._log.check()

    def close(self) -> None:
        """Sync, unless the policy is never, and let go of the directory. Idempotent."""
        with self._write_lock:
            if self._config.fsync is not FsyncPolicy.NEVER:
                self._sync()
            self._log.close()
            closed = OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
            self._fault = _Fault("close", closed, 0, math.inf)

    def _find(self, key: bytes) -> Entry | None:
        fault = self._fault
        if fault is not None and fault.operation == "read":
            return None
        return self._log.find(key)

    def _read(
        self, key: bytes, entry: Entry, out: memoryview, *, forget_damaged: bool
    ) -> BlobHeader | None:
        if len(out) < entry.nbytes:
            raise ValueError(f"{len(out)} bytes have no room for a blob of {entry.nbytes}")
        try:
            return self._log.read(key, entry, out)
        except OSError as error:
            self._log.forget(key, entry)
            self._degrade("read", error)
            return None
        except Damaged:
            if self._log.find(key) is not entry:
                return None  # erased while we read it
            if forget_damaged:
                self._log.forget(key, entry)
            raise

    # Below: with the write lock held, or from the constructor.

    def _open(self) -> None:
        report = self._log.open()
        with self._lock:
            self._counts.scanned_blobs = report.num_blobs
            self._counts.scan_seconds = report.seconds
            self._counts.cut_bytes += report.cut_bytes
        for error in report.errors:
            self._count_failure("scan", error)
        self._log.try_writing(_MIN_PROBE_BYTES)
        self._log.make_room(0)  # the budget may have been larger

    def _probe(self, fault: _Fault) -> None:
        try:
            if fault.error.errno in _NO_ROOM:  # the files are as good as before
                self._log.try_writing(fault.probe_bytes)
            else:
                self._open()
        except OSError as error:
            again_at = self._clock() + self._config.probe_seconds
            self._fault = dataclasses.replace(fault, error=error, probe_at=again_at)
            return
        self._fault = None
        log.info("disk_recovered directory=%s", self._config.directory)

    def _shrink(self) -> None:
        """The disk has less room than the budget says, so the oldest blobs make way for others."""
        if self._log.num_segments > 1:
            with contextlib.suppress(OSError):
                self._log.drop_oldest()

    def _sync(self) -> None:
        self._sync_due_at = self._clock() + self._config.fsync_interval_seconds
        try:
            self._log.sync()
        except OSError as error:
            self._degrade("sync", error)

    def _refuse(self) -> bool:
        with self._lock:
            self._counts.refused_blobs += 1
        return False

    def _count_failure(self, operation: str, error: OSError) -> None:
        with self._lock:
            self._counts.failures[f"{operation} {_code(error)}"] += 1

    def _degrade(self, operation: str, error: OSError, num_bytes: int = 0) -> None:
        probe_bytes = min(max(num_bytes, _MIN_PROBE_BYTES), _MAX_PROBE_BYTES)
        fault = _Fault(operation, error, probe_bytes, self._clock() + self._config.probe_seconds)
        self._count_failure(operation, error)
        with self._lock:
            if self._fault is None or operation == "read":
                self._fault = fault
        log.warning("disk_degraded directory=%s reason=%s", self._config.directory, fault)


def _code(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown")
