"""Hyper-connections against the formula in float64 (spec 2.1), and how nearly comb is balanced."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model1 import hyper_connection as mhc
from model1.config import ModelConfig
from tests.services import tiny_model

TOKENS, D = 9, 40
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
)
each_device = pytest.mark.parametrize("device", DEVICES)
each_n = pytest.mark.parametrize("n", (2, 3, 4))
F64 = torch.float64


def config(n: int, iters: int = 20) -> ModelConfig:
    return replace(tiny_model.CONFIG, hidden_size=D, hc_mult=n, hc_sinkhorn_iters=iters)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Site:
    """Random parameters of one sublayer's hyper-connection."""

    def __init__(self, n: int) -> None:
        rows = (2 + n) * n
        self.fn, self.base, self.scale = draw(rows, n * D) / D**0.5, draw(rows), draw(3, seed=1)

    def to(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.fn.to(device), self.base.to(device), self.scale.to(device)


def slow_mix(
    x: Tensor, site: Site, n: int, config: ModelConfig
) -> tuple[list[float], list[float], list[list[float]]]:
    """One token's pre, post and comb; `x [n, D]`. Plain floats, in the order the spec writes it."""
    flat = x.double().flatten()
    inverse = (flat.square().mean() + config.rms_norm_eps) ** -0.5
    raw = ((site.fn.double() @ flat) * inverse).tolist()
    base, scale, eps = site.base.tolist(), site.scale.tolist(), config.hc_eps

    def sigmoid(value: float) -> float:
        return float(torch.tensor(value, dtype=F64).sigmoid())

    pre = [sigmoid(raw[j] * scale[0] + base[j]) + eps for j in range(n)]
    post = [2 * sigmoid(raw[n + j] * scale[1] + base[n + j]) for j in range(n)]
    comb = []
    for i in range(n):
        at = [2 * n + i * n + j for j in range(n)]
        powers = [float(torch.tensor(raw[k] * scale[2] + base[k], dtype=F64).exp()) for k in at]
        comb.append([power / sum(powers) + eps for power in powers])

    def columns() -> None:
        for j in range(n):
            total = sum(comb[i][j] for i in range(n)) + eps
            for i in range(n):
                comb[i][j] /= total

    columns()
    for _ in range(config.hc_sinkhorn_iters - 1):
        for i in range(n):
            total = sum(comb[i]) + eps
            comb[i] = [value / total for value in comb[i]]
        columns()
    return pre, post, comb


@each_device
@each_n
@pytest.mark.parametrize("iters", (1, 2, 20))
def test_coefficients_are_the_formula(n: int, iters: int, device: str) -> None:
    streams, site, settings = draw(TOKENS, n, D) * 3, Site(n), config(n, iters)
    at = mhc.mix(streams.to(device), *site.to(device), settings)
    for token in range(TOKENS):
        pre, post, comb = slow_mix(streams[token], site, n, settings)
        for part, expected in ((at.pre, pre), (at.post, post), (at.comb, comb)):
            assert part.dtype is torch.float32
            torch.testing.assert_close(
                part[token].cpu().double(), torch.tensor(expected, dtype=F64), rtol=2e-5, atol=2e-6
            )


@each_device
@each_n
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_streams_are_read_and_written_with_comb_transposed(
    n: int, dtype: torch.dtype, device: str
) -> None:
    streams, output = draw(TOKENS, n, D), draw(TOKENS, D, seed=2).to(dtype)
    at = mhc.mix(streams.to(device), *Site(n).to(device), config(n))
    read = mhc.read(streams.to(device), at.pre).cpu()
    written = mhc.write(streams.to(device), output.to(device), at).cpu()
    assert read.dtype is written.dtype is torch.float32
    assert torch.equal(written, written.to(dtype).float())
    pre, post, comb = (part.cpu().double() for part in at)
    tolerance = 1e-5 if dtype is torch.float32 else 2.0**-8  # one rounding
    for token in range(TOKENS):
        x = streams[token].double()
        expected = sum(pre[token, j] * x[j] for j in range(n))
        torch.testing.assert_close(read[token].double(), expected, rtol=1e-5, atol=1e-5)
        for k in range(n):
            kept = sum(comb[token, j, k] * x[j] for j in range(n))
            expected = post[token, k] * output[token].double() + kept
            torch.testing.assert_close(
                written[token, k].double(), expected, rtol=tolerance, atol=1e-5
            )


@each_n
def test_the_head_reads_with_one_scale_and_eps(n: int) -> None:
    streams, settings = draw(TOKENS, n, D), config(n)
    fn, base, scale = draw(n, n * D, seed=4) / D**0.5, draw(n, seed=5), draw(1, seed=6)
    h = mhc.collapse(streams, fn, base, scale, settings)
    for token in range(TOKENS):
        x = streams[token].double()
        inverse = (x.square().mean() + settings.rms_norm_eps) ** -0.5
        raw = (fn.double() @ x.flatten()) * inverse * scale.double() + base.double()
        expected = (raw.sigmoid() + settings.hc_eps) @ x
        torch.testing.assert_close(h[token].double(), expected, rtol=1e-5, atol=1e-5)


@each_device
@pytest.mark.parametrize(("logit", "bound"), ((0.0, 1e-5), (2.0, 1e-3), (6.0, 6e-2)))
def test_columns_of_comb_sum_to_one_and_rows_nearly(
    logit: float, bound: float, device: str
) -> None:
    """The sum normalised last is exact to rounding; the other depends on how far logits spread."""
    uniform = torch.rand(1000, 16, generator=torch.Generator().manual_seed(0))
    comb = _comb_of((uniform * 2 - 1) * logit, device)
    assert (comb >= 0).all()
    assert (comb.sum(dim=1) - 1).abs().max() <= 1e-5  # over the sources, for each target
    assert (comb.sum(dim=2) - 1).abs().max() <= bound


@each_device
def test_extreme_logits_give_finite_coefficients(device: str) -> None:
    logits = torch.tensor([1e3, -1e3, 0.0, 1.0])[(draw(20, 16) * 1e4).long() % 4]
    comb = _comb_of(logits, device)
    assert comb.isfinite().all() and (comb >= 0).all()
    assert (comb.sum(dim=1) - 1).abs().max() <= 1e-5


@each_n
def test_streams_may_change_places(n: int) -> None:
    """Parameters permuted with the streams give the same results, permuted."""
    streams, site, settings = draw(TOKENS, n, D), Site(n), config(n)
    at = mhc.mix(streams, site.fn, site.base, site.scale, settings)
    order = torch.arange(n).roll(1)
    pairs = (2 * n + order[:, None] * n + order).flatten()
    rows = torch.cat([order, n + order, pairs])
    columns = (order[:, None] * D + torch.arange(D)).flatten()
    moved = mhc.mix(
        streams[:, order], site.fn[rows][:, columns], site.base[rows], site.scale, settings
    )
    torch.testing.assert_close(moved.pre, at.pre[:, order])
    torch.testing.assert_close(moved.post, at.post[:, order])
    torch.testing.assert_close(moved.comb, at.comb[:, order][:, :, order], rtol=1e-5, atol=1e-6)


@each_device
def test_coefficients_do_not_change_the_parameters_or_the_streams(device: str) -> None:
    """The numpy twin looks at torch's memory."""
    streams, site = draw(TOKENS, 4, D).to(device), Site(4).to(device)
    before = [tensor.clone() for tensor in (streams, *site)]
    first = mhc.mix(streams, *site, config(4))
    again = mhc.mix(streams, *site, config(4))
    for tensor, kept in zip((streams, *site), before, strict=True):
        assert torch.equal(tensor, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _comb_of(logits: Tensor, device: str) -> Tensor:
    """comb `[T, 4, 4]` of the logits `[T, 16]`: those of silent streams are the base's."""
    n, settings = 4, config(4)
    silent, fn = torch.zeros(1, n, D, device=device), torch.zeros(24, n * D, device=device)
    scale = torch.ones(3, device=device)
    bases = torch.nn.functional.pad(logits, (2 * n, 0)).to(device)
    return torch.cat([mhc.mix(silent, fn, base, scale, settings).comb.cpu() for base in bases])
