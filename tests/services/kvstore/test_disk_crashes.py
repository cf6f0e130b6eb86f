"""What a disk tier finds again after its process was killed, or its files were meddled with."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvstore.blob import Damaged
from services.kvstore.disk import DiskConfig, DiskTier, FsyncPolicy
from services.kvstore.segment import RECORD_ALIGNMENT
from tests.services.kvstore.sample_blobs import sample_blob, sample_key

MAX_BYTES = 1 << 30
SEGMENT = 64 << 10

_WRITER = """
import sys
from pathlib import Path
from tests.services.kvstore.test_disk_crashes import open_tier, nbytes_of
from tests.services.kvstore.sample_blobs import sample_blob, sample_key
tier = open_tier(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 1 << 30):
    assert tier.put(sample_key(number), sample_blob(number, nbytes_of(number)))
    print(number, flush=True)
"""


def open_tier(directory: Path) -> DiskTier:
    return DiskTier(DiskConfig(directory, MAX_BYTES, SEGMENT, fsync=FsyncPolicy.NEVER))


def nbytes_of(number: int) -> int:
    return 1 + number * 7919 % 30_000


def _read(tier: DiskTier, number: int) -> bytes | None:
    nbytes = tier.nbytes_of(sample_key(number))
    if nbytes is None:
        return None
    out = memoryview(bytearray(nbytes))
    return None if tier.get_into(sample_key(number), out) is None else bytes(out)


def test_a_killed_writer_loses_nothing_that_was_taken(tmp_path: Path) -> None:
    """Six lives, each ended in the middle of whatever it was doing."""
    rng = np.random.default_rng(0)
    num_taken = 0
    num_cut = 0
    for _ in range(6):
        command = [sys.executable, "-c", _WRITER, str(tmp_path), str(num_taken)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(int(rng.integers(1, 200))):
                num_taken = int(writer.stdout.readline()) + 1
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
        num_taken = int(rest[-1]) + 1 if rest else num_taken
        tier = open_tier(tmp_path)
        num_cut += tier.counts.cut_bytes > 0
        held = {int.from_bytes(key, "big") for key in tier.keys()}  # noqa: SIM118
        assert held >= set(range(num_taken))
        assert len(held) <= num_taken + 1  # one may have been taken and not told
        assert tier.verify(repair=False).damaged == {}
        tier.check()
        num_taken = len(held)
        tier.close()
    assert num_taken > 50


Meddle = Callable[[bytearray], None]


@st.composite
def meddling(draw: st.DrawFn) -> Meddle:
    """Something that happens to the bytes of a file."""
    kind = draw(st.sampled_from(["flip", "zero", "cut", "swap", "insert", "repeat"]))
    a, b = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    aligned = draw(st.booleans())

    def place(share: float, data: bytearray) -> int:
        at = int(share * max(0, len(data) - 1))
        return at // RECORD_ALIGNMENT * RECORD_ALIGNMENT if aligned else at

    def meddle(data: bytearray) -> None:
        if not data:
            return
        start, other = place(a, data), place(b, data)
        length = min(RECORD_ALIGNMENT, len(data) - max(start, other))
        match kind:
            case "flip":
                data[start] ^= 1 << int(8 * b) % 8
            case "zero":
                data[start : start + 4096] = bytes(len(data[start : start + 4096]))
            case "cut":
                del data[start:]
            case "swap":
                one, two = data[start : start + length], data[other : other + length]
                data[start : start + length] = two
                data[other : other + length] = one
            case "insert":
                data[start:start] = os.urandom(RECORD_ALIGNMENT)
            case "repeat":
                data += data[start:]

    return meddle


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), meddling()), min_size=1, max_size=6))
def test_whatever_happens_to_the_files_what_is_read_is_right(
    meddlings: list[tuple[int, Meddle]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        tier = open_tier(directory)
        for number in range(20):
            tier.put(sample_key(number), sample_blob(number, nbytes_of(number)))
        tier.close()
        segments = sorted(directory.glob("*.segment"))
        for index, meddle in meddlings:
            data = bytearray(segments[index % len(segments)].read_bytes())
            meddle(data)
            segments[index % len(segments)].write_bytes(data)
        tier = open_tier(directory)
        assert tier.degraded is None
        for number in range(20):
            try:
                blob = _read(tier, number)
            except Damaged:
                assert _read(tier, number) is None
                continue
            assert blob in (None, bytes(sample_blob(number, nbytes_of(number))))
        assert tier.verify(repair=True).damaged == {}
        for number in range(20):  # and it is as good as new
            assert tier.put(sample_key(number), sample_blob(number, nbytes_of(number)))
        tier.check()
        tier.close()
        tier = open_tier(directory)
        for number in range(20):
            assert _read(tier, number) == bytes(sample_blob(number, nbytes_of(number)))
        tier.close()
