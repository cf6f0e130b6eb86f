"""What is compiled for the CPU computes what its plain torch twin does, at odd sizes too."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model1 import hyper_connection as mhc
from model1 import kv_arrays, moe, numerics
from model1.compiled import compiled
from model1.config import ModelConfig
from model1.rope import Rotation, rotate_
from tests.services import tiny_model

F32, BF16 = torch.float32, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", (F32, BF16), ids=("float32", "bfloat16"))
each_count = pytest.mark.parametrize("tokens", (0, 1, 2, 7))


@each_count
@pytest.mark.parametrize(("n", "hidden"), ((2, 6), (3, 17), (4, 64)))
def test_hyper_connections(tokens: int, n: int, hidden: int) -> None:
    settings = tiny_model.CONFIG.to_dict() | {"hc_mult": n, "hc_sinkhorn_iters": 20}
    config = ModelConfig.from_dict(settings)
    streams, output = draw(tokens, n, hidden), draw(tokens, hidden)
    num_rows = (2 + n) * n
    parameters = (draw(num_rows, n * hidden) / hidden, draw(num_rows), draw(3))
    at = assert_twins(mhc.mix, streams, *parameters, config)
    assert_twins(mhc.read, streams, at.pre)
    assert_twins(mhc.write, streams, output, at)


@each_dtype
@each_count
@pytest.mark.parametrize("width", (1, 5, 64))
def test_norms(tokens: int, width: int, dtype: torch.dtype) -> None:
    x = draw(tokens, 3, width).to(dtype)
    assert_twins(numerics.rms_norm, x, draw(width), 1e-6)
    assert_twins(numerics.rms_norm, x, draw(3, width), 1e-6)
    assert_twins(numerics.rms_norm, x[:, 1], draw(width), 1e-6)


@each_dtype
@each_count
def test_rotations(tokens: int, dtype: torch.dtype) -> None:
    by = Rotation.at(torch.arange(tokens) * 977, 10000.0 ** -torch.linspace(0, 1, 3))
    heads = draw(tokens, 3, 11).to(dtype)
    for x in (heads, heads[:, 1:], heads[:, 0]):
        turned = rotate_(x.clone(), by)
        assert_same(turned, rotate_.__wrapped__(x.clone(), by))  # type: ignore[attr-defined]
        assert torch.equal(turned[..., :5], x[..., :5])


@each_count
@pytest.mark.parametrize(("experts", "k"), ((1, 1), (8, 2), (33, 33)))
def test_routing(tokens: int, experts: int, k: int) -> None:
    logits = draw(tokens, experts) * 20
    assert_twins(moe.choose_experts, logits, draw(experts), k, 1.5)
    chosen = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens + 1)])[:tokens]
    assert_twins(moe.weigh_experts, logits, chosen, 1.5)


def test_equal_ranks_go_to_the_lowest_expert() -> None:
    logits, bias = torch.zeros(2, 9), torch.zeros(9)
    bias[[2, 5, 7]] = 1.0
    ids, weights = moe.choose_experts(logits, bias, 2, 1.0)
    assert ids.tolist() == [[2, 5], [2, 5]]
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))


@each_dtype
@pytest.mark.parametrize(("stride", "per_unit"), ((1, 1), (6, 2)))
def test_rows_of_a_table(stride: int, per_unit: int, dtype: torch.dtype) -> None:
    table = draw(30, 7).to(dtype)
    for units in ([], [3], [4, 0, 4]):
        taken = assert_twins(
            kv_arrays.taken, table, torch.tensor(units, dtype=torch.int64), stride, per_unit
        )
        rows = [unit * stride + place for unit in units for place in range(per_unit)]
        assert torch.equal(taken, table[rows].float())


def test_it_compiles_where_no_folder_can_be_written_to(tmp_path: Path) -> None:
    """As in a container whose files are read-only: a place for the cache is not needed."""
    source = tmp_path / "triple.py"
    source.write_text(
        "from model1.compiled import compiled\n@compiled\ndef triple(x):\n    return 3 * x\n"
    )
    (tmp_path / "__pycache__").write_text("a file where the cache's folder would be")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import triple; print(triple.triple(5))"
    )
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        env=os.environ | nowhere | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.returncode) == ("15", 0), done.stderr


def test_a_function_keeps_its_name() -> None:
    def twice(x: float) -> float:
        return 2 * x

    assert compiled(twice)(2.5) == 5.0 and compiled(twice).__name__ == "twice"


def assert_twins(function: Callable[..., Any], *args: Any) -> Any:
    fast, plain = function(*args), function.__wrapped__(*args)  # type: ignore[attr-defined]
    pairs = [(fast, plain)] if isinstance(fast, Tensor) else zip(fast, plain, strict=True)
    for a, b in pairs:
        assert_same(a, b)
    return fast


def assert_same(fast: Tensor, plain: Tensor) -> None:
    assert fast.dtype is plain.dtype and fast.shape == plain.shape
    tolerance = 2.0**-7 if fast.dtype is BF16 else 2e-6  # a rounding that fell the other way
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=2e-6)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
