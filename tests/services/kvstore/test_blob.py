import dataclasses
import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from services.kvstore.blob import (
    HEADER_BYTES,
    BlobHeader,
    BlobKind,
    Damaged,
    DamageReason,
    check_blob,
    open_blob,
    read_header,
    seal_into,
)

HEADER = BlobHeader(
    kind=BlobKind.BODY,
    key=bytes(range(32)),
    model_digest=b"m" * 16,
    layout_digest=b"l" * 16,
    start=256,
    end=384,
    payload_nbytes=100,
)
PAYLOAD = bytes(range(100, 200))


def _seal(header: BlobHeader = HEADER, payload: bytes = PAYLOAD) -> bytearray:
    blob = bytearray(header.nbytes)

    def fill(out: memoryview) -> None:
        out[:] = payload

    seal_into(memoryview(blob), header, fill)
    return blob


def _open(blob: bytes | bytearray) -> bytes:
    view = open_blob(
        memoryview(blob),
        key=HEADER.key,
        model_digest=HEADER.model_digest,
        layout_digest=HEADER.layout_digest,
    )
    return bytes(view)


def _reason(blob: bytes | bytearray) -> DamageReason:
    with pytest.raises(Damaged) as caught:
        _open(blob)
    with pytest.raises(Damaged):  # what the worker refuses for its bytes, a tier refuses too
        check_blob(memoryview(blob), HEADER.key)
    return caught.value.reason


def _resealed(blob: bytearray) -> bytearray:
    """The same bytes with a header checksum that fits: what a faulty writer could have made."""
    blob[120:128] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(blob[:120])))
    return blob


@given(payload=st.binary(max_size=300), slack=st.integers(0, 70), kind=st.sampled_from(BlobKind))
def test_what_was_sealed_comes_back(payload: bytes, slack: int, kind: BlobKind) -> None:
    header = dataclasses.replace(HEADER, kind=kind, payload_nbytes=len(payload))
    padded = _seal(header, payload) + bytes(slack)
    assert _open(padded) == payload
    assert read_header(memoryview(padded)) == check_blob(memoryview(padded), HEADER.key) == header


def test_the_layout_on_disk_is_the_documented_one() -> None:
    """Byte by byte: blobs outlive a release, in files and in other processes."""
    checked = (
        b"MODEL1KV"
        + struct.pack("<HHIIIQ", 1, 1, 256, 384, 0, 100)
        + bytes(range(32))
        + b"m" * 16
        + b"l" * 16
        + bytes(8)
        + struct.pack("<QQ", xxhash.xxh3_64_intdigest(PAYLOAD), 0)
    )
    blob = _seal()
    assert bytes(blob) == checked + struct.pack("<Q", xxhash.xxh3_64_intdigest(checked)) + PAYLOAD
    assert HEADER_BYTES == 128


def test_every_flipped_bit_is_found() -> None:
    blob = _seal()
    for bit in range(8 * len(blob)):
        blob[bit // 8] ^= 1 << bit % 8
        where = bit // 8
        reason = _reason(blob)
        if where < 8:
            assert reason is DamageReason.MAGIC
        elif where < 10:
            assert reason is DamageReason.VERSION
        elif where < HEADER_BYTES:
            assert reason is DamageReason.HEADER_CHECKSUM
        else:
            assert reason is DamageReason.PAYLOAD_CHECKSUM
        blob[bit // 8] ^= 1 << bit % 8
    assert _open(blob) == PAYLOAD


def test_every_cut_is_found() -> None:
    blob = _seal()
    for length in range(len(blob)):
        assert _reason(blob[:length]) is DamageReason.TRUNCATED


@given(data=st.data())
def test_zeroed_and_overwritten_spans_are_found(data: st.DataObject) -> None:
    blob = _seal()
    start = data.draw(st.integers(0, len(blob) - 1))
    end = data.draw(st.integers(start + 1, len(blob)))
    filler = data.draw(st.sampled_from([0x00, 0xFF]))
    before = bytes(blob)
    blob[start:end] = bytes([filler]) * (end - start)
    if bytes(blob) != before:
        _reason(blob)


def test_zeros_are_no_blob() -> None:
    assert _reason(bytes(4096)) is DamageReason.MAGIC


def test_swapped_payloads_are_found() -> None:
    other = _seal(payload=PAYLOAD[::-1])
    assert _reason(_seal()[:HEADER_BYTES] + other[HEADER_BYTES:]) is DamageReason.PAYLOAD_CHECKSUM


def test_exchanged_layers_inside_a_payload_are_found() -> None:
    blob = _seal()
    blob[128:178], blob[178:228] = blob[178:228], blob[128:178]
    assert _reason(blob) is DamageReason.PAYLOAD_CHECKSUM


def test_a_whole_blob_of_another_key_is_found() -> None:
    stale = _seal(dataclasses.replace(HEADER, key=b"k" * 32))
    assert _reason(stale) is DamageReason.KEY


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (dataclasses.replace(HEADER, model_digest=b"M" * 16), DamageReason.MODEL),
        (dataclasses.replace(HEADER, layout_digest=b"L" * 16), DamageReason.LAYOUT),
    ],
)
def test_a_blob_of_another_model_or_layout_is_whole_but_not_served(
    header: BlobHeader, reason: DamageReason
) -> None:
    blob = _seal(header)
    with pytest.raises(Damaged) as caught:
        _open(blob)
    assert caught.value.reason is reason
    assert check_blob(memoryview(blob), HEADER.key) == header


@pytest.mark.parametrize(
    ("offset", "value"),
    [(10, struct.pack("<H", 9)), (12, struct.pack("<II", 5, 4))],
    ids=["unknown kind", "range that ends before it starts"],
)
def test_a_header_that_adds_up_but_makes_no_sense_is_refused(offset: int, value: bytes) -> None:
    blob = _seal()
    blob[offset : offset + len(value)] = value
    assert _reason(_resealed(blob)) is DamageReason.HEADER_FIELD


def test_a_length_beyond_the_buffer_is_refused() -> None:
    blob = _seal()
    blob[24:32] = struct.pack("<Q", 2**64 - 1)
    assert _reason(_resealed(blob)) is DamageReason.TRUNCATED


def test_a_fill_that_fails_leaves_no_blob_even_over_an_old_one() -> None:
    blob = _seal()

    def fail(out: memoryview) -> None:
        out[:50] = bytes(50)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        seal_into(memoryview(blob), HEADER, fail)
    assert _reason(blob) is DamageReason.MAGIC


def test_a_buffer_without_room_is_refused_untouched() -> None:
    buffer = bytearray(b"x" * (HEADER.nbytes - 1))
    with pytest.raises(ValueError, match="227 bytes have no room for a blob of 228"):
        seal_into(memoryview(buffer), HEADER, lambda out: None)
    assert buffer == b"x" * 227


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": b"short"}, "key has 32 bytes, got 5"),
        ({"model_digest": b""}, "digests have 16 bytes, got 0"),
        ({"start": 3, "end": 2}, r"\[3, 2\)"),
        ({"payload_nbytes": -1}, "-1 bytes"),
    ],
)
def test_a_header_that_no_blob_can_have_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HEADER, **change)  # type: ignore[arg-type]
