"""One append-only file of blobs on disk: records, and finding them again by their headers alone.

    record = blob | zeros up to the next multiple of RECORD_ALIGNMENT

Nothing else is in the file: a header that verifies is all it takes to find a record, and a stretch
that does not verify is skipped up to the next header that does. Knows no index, no budget and no
policy. Raises OSError as the file does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from services.kvstore.blob import (
    HEADER_BYTES,
    MAGIC,
    BlobHeader,
    Damaged,
    DamageReason,
    check_blob,
    read_header,
)

RECORD_ALIGNMENT = 512
FILE_MODE = 0o600
_PADDING = bytes(RECORD_ALIGNMENT)
# Small records are read past rather than skipped: those of 20 KB came at 2,500 a second off a disk
# when every header was a read of its own.
_SCAN_BYTES = 64 << 10
_PAGE_BYTES = 4096
_SEARCH_BYTES = 1 << 20
_ZEROS = bytes(_SEARCH_BYTES)


def record_nbytes(blob_nbytes: int) -> int:
    """What a blob takes of a file."""
    return -(-blob_nbytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


class Record(NamedTuple):
    """Where a blob with this header starts."""

    offset: int
    header: BlobHeader


class _Descriptor:
    """An open file, closed when the last thread that still reads from it lets go."""

    def __init__(self, number: int) -> None:
        self.number = number

    @classmethod
    def open(cls, path: Path, *, create: bool) -> _Descriptor:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            creating = os.O_CREAT | os.O_EXCL if create else 0
            return cls(os.open(path, flags | creating | os.O_RDWR, FILE_MODE))
        except OSError as error:
            if create or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return cls(os.open(path, flags | os.O_RDONLY))  # it can still be read

    def __del__(self) -> None:
        os.close(self.number)


class Segment:
    """A file and the offset where the next record goes. Appending is for one thread at a time."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self._descriptor = _Descriptor.open(path, create=create)
        self.num_bytes = os.fstat(self._descriptor.number).st_size

    def append(self, blob: memoryview) -> int:
        """Write a record at the end; returns its offset. What failed half-way is cut off again."""
        offset = self.num_bytes
        padding = _PADDING[: record_nbytes(len(blob)) - len(blob)]
        descriptor = self._descriptor
        try:
            written = os.pwritev(descriptor.number, [blob, padding], offset)
            while written < len(blob) + len(padding):  # a full disk or a signal cut it short
                rest: list[bytes | memoryview] = [blob[written:]]
                rest.append(padding[max(0, written - len(blob)) :])
                written += os.pwritev(descriptor.number, rest, offset + written)
        except OSError:
            os.ftruncate(descriptor.number, offset)
            raise
        self.num_bytes = offset + written
        return offset

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset`; raises Damaged if the file ends before."""
        descriptor = self._descriptor
        filled = 0
        while filled < len(out):
            read = os.preadv(descriptor.number, [out[filled:]], offset + filled)
            if not read:
                raise Damaged(DamageReason.TRUNCATED)
            filled += read

    def erase(self, offset: int, blob_nbytes: int) -> None:
        """Overwrite a record with zeros: no scan finds it, and its contents are gone."""
        descriptor = self._descriptor
        end = offset + blob_nbytes
        while offset < end:
            offset += os.pwrite(descriptor.number, _ZEROS[: end - offset], offset)

    def sync(self) -> None:
        """Return when what was appended survives a loss of power."""
        descriptor = self._descriptor
        os.fdatasync(descriptor.number)

    def remove(self) -> None:
        """Give the bytes back to the file system, as soon as nobody reads them any more."""
        self.path.unlink(missing_ok=True)

    def scan(self) -> Iterator[Record]:
        """Every record whose header verifies and whose end is inside the file.

        Payloads are not read, but for those of records that follow on something else: a header that
        lies where none belongs must not hide the records in what it claims to be its payload.
        """
        offset = 0
        follows_a_record = True
        window, window_offset, window_bytes = b"", 0, _PAGE_BYTES
        while offset + HEADER_BYTES <= self.num_bytes:
            at = offset - window_offset
            if at + HEADER_BYTES > len(window):
                window, window_offset, at = self._read(window_bytes, offset), offset, 0
            header = self._header_in(window[at : at + HEADER_BYTES], offset)
            if header is None or not (follows_a_record or self._is_whole(Record(offset, header))):
                offset = self._next_magic(offset + RECORD_ALIGNMENT)
                follows_a_record = False
                continue
            yield Record(offset, header)
            follows_a_record = True
            num_bytes = record_nbytes(header.nbytes)
            offset += num_bytes
            window_bytes = _SCAN_BYTES if num_bytes < _SCAN_BYTES else _PAGE_BYTES

    def cut_after_last_whole(self, records: list[Record]) -> int:
        """Drop the end of the file, and of `records`, that a crash tore; returns the bytes cut."""
        while records and not self._is_whole(records[-1]):
            records.pop()
        end = records[-1].offset + record_nbytes(records[-1].header.nbytes) if records else 0
        num_cut = self.num_bytes - end
        if num_cut > 0:
            os.ftruncate(self._descriptor.number, end)
        # A torn record may lack only padding: then the file is shorter than `end`, and nothing is.
        self.num_bytes = end
        return max(0, num_cut)

    def _is_whole(self, record: Record) -> bool:
        blob = memoryview(bytearray(record.header.nbytes))
        try:
            self.read_into(record.offset, blob)
            check_blob(blob, record.header.key)
        except Damaged:
            return False
        return True

    def _header_in(self, sealed: bytes, offset: int) -> BlobHeader | None:
        try:
            header = read_header(memoryview(sealed))
        except Damaged:
            return None
        return header if offset + header.nbytes <= self.num_bytes else None

    def _next_magic(self, offset: int) -> int:
        """The first aligned offset from `offset` on where a header may start, or the end."""
        while offset < self.num_bytes:
            # Whole alignments: a magic never lies across two chunks.
            chunk = self._read(_SEARCH_BYTES, offset)
            if not chunk:
                break
            at = chunk.find(MAGIC)
            while at >= 0 and at % RECORD_ALIGNMENT:
                at = chunk.find(MAGIC, at + 1)
            if at >= 0:
                return offset + at
            offset += _SEARCH_BYTES
        return self.num_bytes

    def _read(self, num_bytes: int, offset: int) -> bytes:
        return os.pread(self._descriptor.number, num_bytes, offset)
