"""The record against a packer in plain Python, written from the format's description alone."""

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.fp8 import Fp8IndexKey, Fp8Record

# (head_dim, rope_dim): released, shipped, and mini sizes; a short tile behind whole ones; one
# dim of code; no rotary dims' codes at all.
SIZES = ((512, 64), (64, 16), (32, 8), (16, 4), (96, 16), (200, 8), (68, 66), (16, 16), (192, 64))
each_size = pytest.mark.parametrize(("head_dim", "rope_dim"), SIZES)
each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)

# Magnitudes of codes 0..126; the exponent's bias is 7 and exponent 0 holds the subnormals.
E4M3 = [
    math.ldexp(code & 7, -9) if code < 8 else math.ldexp(8 + (code & 7), (code >> 3) - 10)
    for code in range(127)
]


def e4m3_code(value: float) -> int:
    """Nearest, ties to the even code; |value| at most 448."""
    sign, magnitude = (0x80, -value) if math.copysign(1, value) < 0 else (0, value)
    above = bisect_left(E4M3, magnitude)
    if above == 0:
        return sign
    below = above - 1
    low, high = magnitude - E4M3[below], E4M3[above] - magnitude  # exact: few bits each
    return sign | (below if low < high or (low == high and below % 2 == 0) else above)


def e4m3_value(code: int) -> float:
    return math.copysign(E4M3[code & 0x7F], -1 if code & 0x80 else 1)


def exponent_of(tile: Sequence[float]) -> int:
    """The least e with 448 * 2^e >= the largest magnitude, which counts as 1e-4 at least."""
    fraction, exponent = math.frexp(max(max(map(abs, tile)), 1e-4))
    return exponent - (9 if fraction <= 0.875 else 8)  # 448 = 0.875 * 2^9


def pack_page(rows: Sequence[Sequence[float]], rope_dim: int) -> tuple[bytes, bytes]:
    """Section 4.1's planar page: all entries' codes and rotary dims, then all entries' scales."""
    data, scales = b"", b""
    for row in rows:
        coded, roped = row[: len(row) - rope_dim], row[len(row) - rope_dim :]
        row_scales = []
        for start in range(0, len(coded), 64):
            tile = coded[start : start + 64]
            exponent = exponent_of(tile)
            row_scales.append(exponent + 127)
            data += bytes(e4m3_code(math.ldexp(value, -exponent)) for value in tile)
        data += b"".join(struct.pack("<f", value)[2:] for value in roped)  # bfloat16: upper half
        scales += bytes(row_scales)
    return data, scales


def unpack_row(record: bytes, head_dim: int, rope_dim: int) -> list[float]:
    n = head_dim - rope_dim
    codes, roped, scales = record[:n], record[n : n + 2 * rope_dim], record[n + 2 * rope_dim :]
    values = [math.ldexp(e4m3_value(c), scales[i // 64] - 127) for i, c in enumerate(codes)]
    return values + [
        struct.unpack("<f", b"\0\0" + roped[i : i + 2])[0] for i in range(0, len(roped), 2)
    ]


def draw_rows(num_rows: int, head_dim: int, seed: int = 0) -> Tensor:
    """bfloat16 rows whose tiles differ in size from below 1e-4 to thousands."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-20, 12, (num_rows, 1), generator=generator)
    rows = torch.randn(num_rows, head_dim, generator=generator) * torch.exp2(sizes.float())
    spread = torch.exp2(-torch.randint(0, 12, (num_rows, head_dim), generator=generator).float())
    return (rows * spread).bfloat16()


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal also in the signs of zeros."""
    assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_the_released_model_has_the_584_bytes_of_its_kernels() -> None:
    record = Fp8Record(512, 64)
    assert (record.code_dims, record.num_tiles, record.scales_start) == (448, 7, 576)
    assert record.num_bytes == 584


@each_size
def test_records_are_whole_words(head_dim: int, rope_dim: int) -> None:
    record = Fp8Record(head_dim, rope_dim)
    parts = record.code_dims + 2 * rope_dim + record.num_tiles
    assert parts <= record.num_bytes < parts + 8
    assert record.num_bytes % 8 == 0


@each_device
@each_size
def test_bytes_are_those_of_a_planar_page_in_another_order(
    head_dim: int, rope_dim: int, device: str
) -> None:
    rows, record = draw_rows(37, head_dim), Fp8Record(head_dim, rope_dim)
    packed = record.encode(rows.to(device)).cpu()
    data, scales = pack_page(rows.tolist(), rope_dim)
    end = record.scales_start + record.num_tiles
    assert packed[:, : record.scales_start].contiguous().numpy().tobytes() == data
    assert packed[:, record.scales_start : end].contiguous().numpy().tobytes() == scales
    assert not packed[:, end:].any()


@each_device
@each_size
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_rows_are_read_as_the_format_says(
    head_dim: int, rope_dim: int, dtype: torch.dtype, device: str
) -> None:
    rows, record = draw_rows(37, head_dim), Fp8Record(head_dim, rope_dim)
    packed = record.encode(rows)
    told = [unpack_row(r.numpy().tobytes(), head_dim, rope_dim) for r in packed]
    assert_same_bits(record.decode(packed.to(device), dtype).cpu(), torch.tensor(told, dtype=dtype))


def test_every_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """All numbers up to 448, each in a tile whose scale is 1: by its size alone 448 makes it so."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = every[every.float().abs() <= 448]
    tiles = torch.full((len(values), 64), 448.0, dtype=torch.bfloat16)
    tiles[:, 17] = values
    packed = Fp8Record(80, 16).encode(torch.nn.functional.pad(tiles, (0, 16)))
    assert (packed[:, 96] == 127).all()
    assert_same_bits(packed[:, 17], values.to(torch.float8_e4m3fn).view(torch.uint8))
    assert packed[:, 17].tolist() == [e4m3_code(value) for value in values.tolist()]


@each_device
def test_every_code_is_read_as_torch_reads_it(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]  # NaN: never written
    record = Fp8Record(80, 16)
    packed = torch.zeros(len(codes), record.num_bytes, dtype=torch.uint8)
    packed[:, 5], packed[:, record.scales_start] = codes, 127
    values = codes.view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16):
        decoded = record.decode(packed.to(device), dtype)[:, 5].cpu()
        assert_same_bits(decoded.contiguous(), values.to(dtype))


@pytest.mark.parametrize("exponent", range(-40, 128))
def test_the_scale_is_exact_around_every_power_of_two(exponent: int) -> None:
    """Where a logarithm in floating point is off by one."""
    record = Fp8Record(80, 16)
    for mantissa in (1.0, 1.0078125, 1.7421875, 1.75, 1.7578125, 1.9921875):
        peak = math.ldexp(mantissa, exponent)
        wanted = next(e for e in range(-22, 129) if math.ldexp(448, e) >= max(peak, 1e-4))
        for sign in (1, -1):
            row = torch.zeros(1, 80, dtype=torch.bfloat16)
            row[0, 3] = sign * peak
            packed = record.encode(row)
            assert packed[0, record.scales_start] == wanted + 127


def test_zero_bytes_are_zeros() -> None:
    """Padding in index tensors points at rows that nobody wrote."""
    for head_dim, rope_dim in SIZES:
        record = Fp8Record(head_dim, rope_dim)
        for dtype in (torch.float32, torch.bfloat16):
            zeros = record.decode(torch.zeros(2, record.num_bytes, dtype=torch.uint8), dtype)
            assert_same_bits(zeros, torch.zeros(2, head_dim, dtype=dtype))


@pytest.mark.parametrize("bad", (math.nan, -math.nan, math.inf, -math.inf))
def test_a_number_that_is_none_spoils_its_tile_and_no_other(bad: float) -> None:
    record = Fp8Record(200, 8)
    rows = draw_rows(3, 200)
    clean = record.decode(record.encode(rows), torch.bfloat16)
    rows[1, 70] = bad
    packed = record.encode(rows)
    decoded = record.decode(packed, torch.bfloat16)
    assert not decoded[1, 64:128].isfinite().any()
    decoded[1, 64:128] = clean[1, 64:128]
    assert_same_bits(decoded, clean)


@settings(max_examples=60, deadline=None)
@given(
    head_quarters=st.integers(1, 70),
    rope_halves=st.integers(1, 60),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_is_read_back_within_half_a_step(
    head_quarters: int, rope_halves: int, shape: list[int], seed: int
) -> None:
    head_dim = 4 * head_quarters
    rope_dim = min(2 * rope_halves, head_dim)
    record = Fp8Record(head_dim, rope_dim)
    rows = draw_rows(math.prod(shape), head_dim, seed).view(*shape, head_dim)
    packed = record.encode(rows)
    assert packed.shape == (*shape, record.num_bytes)
    decoded = record.decode(packed, torch.bfloat16)
    assert_same_bits(decoded.float(), record.decode(packed, torch.float32))
    assert_same_bits(record.encode(rows.float()), packed)
    n = record.code_dims
    assert_same_bits(decoded[..., n:].contiguous(), rows[..., n:].contiguous())
    # Half of the last of 4 bits of the value, or of the smallest subnormal of the tile's scale.
    byte = packed[..., record.scales_start : record.scales_start + record.num_tiles]
    step = torch.exp2(byte.repeat_interleave(64, dim=-1)[..., :n].float() - 127 - 9)
    error = (decoded.float() - rows.float())[..., :n].abs()
    assert (error <= torch.maximum(rows[..., :n].float().abs() / 16, step / 2)).all()
    # What was read is written again as it was: rounding twice is rounding once.
    assert_same_bits(record.decode(record.encode(decoded), torch.bfloat16), decoded)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 99), min_size=1, max_size=130), seed=st.integers(0, 99))
def test_a_record_does_not_depend_on_its_neighbours(rows: list[int], seed: int) -> None:
    for head_dim, rope_dim in ((64, 16), (200, 8)):
        record, every = Fp8Record(head_dim, rope_dim), draw_rows(100, head_dim, seed)
        packed = record.encode(every)
        assert_same_bits(record.encode(every[rows]), packed[rows])
        decoded = record.decode(packed, torch.bfloat16)
        assert_same_bits(record.decode(packed[rows], torch.bfloat16), decoded[rows])


def test_the_error_on_normal_numbers_is_that_of_e4m3() -> None:
    """2.7 % of the signal (spec 4.1)."""
    rows = torch.randn(2000, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    record = Fp8Record(512, 64)
    decoded = record.decode(record.encode(rows), torch.float32)
    error, signal = (decoded - rows.float())[:, :448], rows.float()[:, :448]
    assert 0.025 < error.norm() / signal.norm() < 0.028


INDEX_DIMS = (1, 16, 31, 128, 130)


@each_device
@pytest.mark.parametrize("dims", INDEX_DIMS)
def test_index_keys_have_one_float32_scale_behind_their_codes(dims: int, device: str) -> None:
    """Section 4.4's planar page in another order, read back in both dtypes."""
    rows, record = draw_rows(37, dims), Fp8IndexKey(dims)
    assert record.num_bytes == dims + 4
    packed = record.encode(rows.to(device))
    for row, key in zip(rows.tolist(), packed.cpu(), strict=True):
        exponent = exponent_of(row)
        codes = [e4m3_code(math.ldexp(value, -exponent)) for value in row]
        assert key.numpy().tobytes() == bytes(codes) + struct.pack("<f", 2.0**exponent)
    told = [
        [math.ldexp(e4m3_value(code), exponent_of(row)) for code in key[:dims]]
        for row, key in zip(rows.tolist(), packed.tolist(), strict=True)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_bits(record.decode(packed, dtype).cpu(), torch.tensor(told, dtype=dtype))


def test_an_index_key_that_is_not_finite_is_not_read_as_a_number() -> None:
    record, rows = Fp8IndexKey(16), draw_rows(3, 16)
    for bad in (math.nan, math.inf, -math.inf):
        rows[1, 5] = bad
        decoded = record.decode(record.encode(rows), torch.float32)
        assert not decoded[1].isfinite().any()
        assert decoded[[0, 2]].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    dims=st.integers(1, 200),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_index_keys_of_any_shape(dims: int, shape: list[int], seed: int) -> None:
    record, rows = Fp8IndexKey(dims), draw_rows(math.prod(shape), dims, seed).view(*shape, dims)
    packed = record.encode(rows)
    assert packed.shape == (*shape, dims + 4)
    decoded = record.decode(packed, torch.bfloat16)
    assert_same_bits(record.encode(rows.float()), packed)
    assert_same_bits(decoded.float(), record.decode(packed, torch.float32))
    assert_same_bits(record.decode(record.encode(decoded), torch.bfloat16), decoded)
    assert not record.decode(torch.zeros_like(packed), torch.float32).any()
