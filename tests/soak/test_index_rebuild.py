"""A store's disk after its process was killed while it wrote: all that was flushed is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, seal_into
from services.kvstore.disk import DiskConfig, DiskTier

NUM_FLUSHED = 30_000
PAYLOAD_NBYTES = 3584  # a body of the tiny models
MIN_BLOCKS_PER_SECOND = 3000


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")


def blob_of(number: int) -> memoryview:
    header = BlobHeader(BlobKind.BODY, key_of(number), b"m" * 16, b"l" * 16, 0, 128, PAYLOAD_NBYTES)
    blob = memoryview(bytearray(header.nbytes))

    def fill(out: memoryview) -> None:
        out[:] = key_of(number) * (len(out) // 32)

    seal_into(blob, header, fill)
    return blob


def write_for_ever(directory: Path) -> None:
    """In the process that is killed: says when NUM_FLUSHED blobs are flushed, and goes on."""
    disk = DiskTier(DiskConfig(directory, max_bytes=4 << 30))
    number = 0
    while True:
        assert disk.put(key_of(number), blob_of(number))
        number += 1
        if number == NUM_FLUSHED:
            disk.flush()
            print("flushed", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_store_finds_what_it_flushed_in_no_time(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.soak.test_index_rebuild", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "flushed\n"
        time.sleep(0.2)  # it is in the middle of a write
        os.kill(writer.pid, signal.SIGKILL)
    disk = DiskTier(DiskConfig(tmp_path, max_bytes=4 << 30))
    counts = disk.counts
    rate = counts.scanned_blobs / counts.scan_seconds
    room = memoryview(bytearray(HEADER_BYTES + PAYLOAD_NBYTES))
    hits = 0
    for number in range(NUM_FLUSHED):
        if disk.get_into(key_of(number), room) is not None:
            hits += room == blob_of(number)
    disk.check()
    disk.close()
    print(
        f"{hits} of {NUM_FLUSHED} flushed blobs hit; {counts.scanned_blobs} found in "
        f"{counts.scan_seconds:.2f} s: {rate:.0f} a second; {counts.cut_bytes} torn bytes cut"
    )
    assert hits == NUM_FLUSHED
    assert rate >= MIN_BLOCKS_PER_SECOND


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))
