"""A row has the same bits whatever rows stand beside it, for every operation the model is made of.

torch chooses another kernel by size, so the shapes are those of the small test models, of the
shipped one and of the benchmark's: no one of them proves anything about the next.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.hyper_connection import collapse, mix, read, write
from model1.modules import GateWeights
from model1.moe import route
from model1.numerics import (
    HalfMatrix,
    bmm,
    linear,
    pack,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    swiglu,
)
from model1.rope import Rotation, rotate_
from tests.services import tiny_model

F32, BF16 = torch.float32, torch.bfloat16
ROWS = 131
COUNTS = (1, 2, 3, 4, 5, 7, 8, 14, 15, 16, 17, 31, 32, 33, 64, 100)

# (N, K) of `linear`: single and few columns (gates, mixing), long sums (mini's wo_a), the rest.
MATRICES = (
    (1, 64),
    (2, 64),
    (3, 32),
    (4, 2048),
    (8, 192),
    (16, 16),
    (24, 256),
    (24, 2048),
    (32, 512),
    (64, 64),
    (112, 192),
    (160, 192),
    (192, 56),
    (256, 2048),
    (512, 2048),
    (768, 512),
    (1024, 512),
)
# (K, N) of `bmm`: head width times keys (transposed in memory), keys times head width.
SCORES = ((8, 3), (8, 12), (16, 6), (32, 24), (64, 64), (128, 32), (64, 192), (512, 384))
VALUES = ((3, 8), (12, 16), (24, 32), (64, 16), (64, 64), (192, 64), (384, 512))

each_dtype = pytest.mark.parametrize("dtype", (F32, BF16), ids=("float32", "bfloat16"))
RowWise = Callable[..., Tensor]


@each_dtype
@pytest.mark.parametrize("layout", ("plain", "packed"))
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_a_row_of_linear_does_not_depend_on_its_batch(
    shape: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    n, k = shape
    x, plain = _draw(ROWS, k, dtype=dtype), _draw(n, k, dtype=dtype)
    weight = pack(plain) if layout == "packed" else plain
    _assert_row_invariant(lambda rows: linear(rows, weight), x)
    exact = x.double() @ plain.double().T
    tolerance = 1e-5 if dtype is F32 else 1e-2
    assert (linear(x, weight) - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("shape", (*MATRICES, (1000, 512), (50, 7168)), ids=str)
def test_a_row_of_a_product_in_half_the_memory_does_not_depend_on_its_batch(
    shape: tuple[int, int],
) -> None:
    n, k = shape
    x, plain = _draw(ROWS, k), _draw(n, k, dtype=BF16).float() * 0.02
    plain = plain.bfloat16().float()
    weight = pack(plain)
    assert isinstance(weight, HalfMatrix)
    _assert_row_invariant(lambda rows: linear(rows, weight), x)
    assert linear(x[:0], weight).shape == (0, n)
    exact = x.double() @ plain.double().T
    assert (linear(x, weight) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("exponent", (-15, -3, 0, 9, 15))
def test_a_float32_weight_that_float16_holds_at_some_scale_loses_nothing(exponent: int) -> None:
    plain = torch.tensor([[1.0, -(2.0**-20)], [2.0**-29, 0.0]]) * 2.0**exponent
    weight = pack(plain)
    assert isinstance(weight, HalfMatrix)
    assert torch.equal(linear(torch.eye(2), weight), plain.T)


@pytest.mark.parametrize(
    "values",
    ((1.0, 2.0**-41), (1.0 + 2.0**-11, 1.0), (0.0, 0.0), (1.0, torch.inf), (2.0**-20, 2.0**20)),
    ids=str,
)
def test_a_float32_weight_that_float16_does_not_hold_stays_float32(
    values: tuple[float, float],
) -> None:
    plain = torch.tensor([values])
    weight = pack(plain)
    assert isinstance(weight, torch.Tensor)
    if plain.isfinite().all():
        assert torch.equal(linear(torch.eye(2), weight), plain.T)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_a_packed_bfloat16_weight_gives_the_bits_of_the_plain_one_or_better(
    shape: tuple[int, int],
) -> None:
    n, k = shape
    x, weight = _draw(ROWS, k, dtype=BF16), _draw(n, k, dtype=BF16)
    packed = pack(weight)
    if isinstance(packed, HalfMatrix):  # the CPU has no unit: one rounding of a float32 product
        product = linear(x.float(), packed)
        assert linear(x, packed).dtype is BF16
        assert torch.equal(linear(x, packed), product.bfloat16())
        return
    for count in (*COUNTS, ROWS):
        assert torch.equal(linear(x[:count], packed), linear(x[:count], weight))


@each_dtype
@pytest.mark.parametrize(
    ("operand", "shape"),
    [("keys", shape) for shape in SCORES] + [("values", shape) for shape in VALUES],
    ids=str,
)
def test_a_row_of_bmm_depends_on_its_own_matrix_alone(
    operand: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    k, n = shape
    a, b = _draw(3, ROWS, k, dtype=dtype), _draw(3, k, n, dtype=dtype)
    if operand == "keys":
        b = b.mT.contiguous().mT
    whole = bmm(a, b)
    exact = a.double() @ b.double()
    tolerance = 1e-5 if dtype is F32 else 1e-2
    assert (whole - exact).abs().max() <= tolerance * exact.abs().max()
    for batch in (1, 2, 3):
        _assert_row_invariant(
            lambda rows, batch=batch: bmm(rows.transpose(0, 1)[:batch], b[:batch]).transpose(0, 1),
            a.transpose(0, 1),
            whole[:batch].transpose(0, 1),
        )


@each_dtype
@pytest.mark.parametrize("width", (8, 12, 30, 32, 192, 512, 1000))
def test_norms_and_activations_are_row_invariant(width: int, dtype: torch.dtype) -> None:
    x, y = _draw(ROWS, width, dtype=dtype) * 8, _draw(ROWS, width, dtype=dtype) * 8
    weight = _draw(width)
    _assert_row_invariant(lambda rows: rms_norm(rows, weight, 1e-6), x)
    pair = _draw(2, width // 2)
    _assert_row_invariant(lambda rows: rms_norm(rows.unflatten(-1, (2, -1)), pair, 1e-6), x)
    _assert_row_invariant(lambda rows: swiglu(rows, 10.0), torch.cat([x, y], dim=-1))
    for function in (sigmoid, silu, softplus):
        _assert_row_invariant(function, x.float())


@each_dtype
@pytest.mark.parametrize("rotary", (2, 6, 8, 16, 64))
def test_rotation_is_row_invariant(rotary: int, dtype: torch.dtype) -> None:
    frequencies = 10000.0 ** -torch.linspace(0, 1, rotary // 2)
    positions = torch.arange(ROWS) * 977
    heads = _draw(ROWS, 3, rotary + 4, dtype=dtype)
    _assert_row_invariant(
        lambda x, at: rotate_(x.clone(), Rotation.at(at, frequencies)), heads, None, positions
    )
    _assert_row_invariant(
        lambda x, at: rotate_(x.clone(), Rotation.at(at, frequencies).inverse()),
        heads[:, 0],
        None,
        positions,
    )


@each_dtype
@pytest.mark.parametrize("hidden", (16, 30, 192, 512))
@pytest.mark.parametrize("n", (2, 3, 4))
def test_hyper_connections_are_row_invariant(n: int, hidden: int, dtype: torch.dtype) -> None:
    config = _config(hc_mult=n, hc_sinkhorn_iters=20)
    streams, output = _draw(ROWS, n, hidden), _draw(ROWS, hidden, dtype=dtype)
    num_rows = (2 + n) * n
    fn, base, scale = _draw(num_rows, n * hidden) / hidden, _draw(num_rows), _draw(3)
    at = mix(streams, fn, base, scale, config)
    for part in range(3):
        _assert_row_invariant(
            lambda x, part=part: mix(x, fn, base, scale, config)[part], streams, at[part]
        )
    _assert_row_invariant(read, streams, None, at.pre)
    _assert_row_invariant(
        lambda x, y, *parts: write(x, y, type(at)(*parts)), streams, None, output, *at
    )
    _assert_row_invariant(lambda x: collapse(x, fn[:n], base[:n], scale[:1], config), streams)


@each_dtype
@pytest.mark.parametrize("experts", (1, 4, 8, 32, 33))
def test_routing_is_row_invariant(experts: int, dtype: torch.dtype) -> None:
    config = _config(n_routed_experts=experts, num_experts_per_tok=min(experts, 3))
    gate = GateWeights(config, hashed=False, device=torch.device("cpu"))
    gate.weight.data.copy_(_draw(experts, config.hidden_size))
    gate.bias.data.copy_(_draw(experts))
    tokens = torch.arange(ROWS)
    x = _draw(ROWS, config.hidden_size, dtype=dtype)
    for part in (0, 1):
        _assert_row_invariant(
            lambda rows, ids, part=part: route(rows, ids, gate, config)[part].detach(),
            x,
            None,
            tokens,
        )


def test_activations_are_exact_at_the_extremes() -> None:
    x = torch.tensor([-300.0, -100.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 100.0, 300.0])
    exact = x.double()
    torch.testing.assert_close(sigmoid(x), exact.sigmoid().float())
    torch.testing.assert_close(silu(x), (exact * exact.sigmoid()).float())
    soft = torch.log1p(torch.exp(-exact.abs())) + exact.clamp_min(0)
    torch.testing.assert_close(softplus(x), soft.float())
    assert (softplus(x[1:]) > 0).all(), "a router row of zeros has no weights (trap T11)"


def test_swiglu_clamps_the_gate_from_above_and_up_on_both_sides() -> None:
    gate = torch.tensor([12.0, -12.0, 10.0, 3.0, 3.0])
    up = torch.tensor([2.0, 2.0, 2.0, 15.0, -15.0])
    clamped_gate = torch.tensor([10.0, -12.0, 10.0, 3.0, 3.0], dtype=torch.float64)
    clamped_up = torch.tensor([2.0, 2.0, 2.0, 10.0, -10.0], dtype=torch.float64)
    expected = clamped_gate * clamped_gate.sigmoid() * clamped_up
    gate_up = torch.cat([gate, up])
    torch.testing.assert_close(swiglu(gate_up, 10.0), expected.float())
    assert swiglu(gate_up.bfloat16(), 10.0).dtype is F32


@each_dtype
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    x, weight = _draw(5, 48, dtype=dtype), _draw(48)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    actual = rms_norm(x, weight, 1e-6)
    assert actual.dtype is dtype
    tolerance = 1e-6 if dtype is F32 else 2.0**-8  # half a bfloat16 step
    assert ((actual - expected).abs() <= tolerance * 1.01 * expected.abs() + 1e-7).all()


@pytest.mark.parametrize("function", (linear, bmm), ids=("linear", "bmm"))
@each_dtype
def test_no_rows_give_no_rows(function: RowWise, dtype: torch.dtype) -> None:
    if function is linear:
        assert linear(_draw(0, 64, dtype=dtype), _draw(8, 64, dtype=dtype)).shape == (0, 8)
    else:
        a, b = _draw(2, 0, 64, dtype=dtype), _draw(2, 64, 8, dtype=dtype)
        assert bmm(a, b).shape == (2, 0, 8)


def _config(**changes: int) -> ModelConfig:
    settings = tiny_model.CONFIG.to_dict() | changes
    return ModelConfig.from_dict(settings)


def _draw(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    seed = sum(size * 1009**i for i, size in enumerate(shape)) % 2**31
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _assert_row_invariant(
    function: RowWise, x: Tensor, whole: Tensor | None = None, *others: Tensor
) -> None:
    """`function` of some of the rows (of all its arguments) gives those rows of the whole."""
    arguments = (x, *others)
    if whole is None:
        whole = function(*arguments)
    for count in COUNTS:
        for start in {0, (ROWS - count) // 2 | 1, ROWS - count}:
            rows = slice(start, start + count)
            part = function(*(argument[rows] for argument in arguments))
            assert torch.equal(part, whole[rows]), f"rows [{start}, {start + count}) differ"
