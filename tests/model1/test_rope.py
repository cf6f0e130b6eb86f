"""Rotary tables against the spec's numbers, and the rotation against complex products."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model1.config import ModelConfig, YarnConfig
from model1.rope import Rope, Rotation, rotate_
from tests.services import tiny_model

RELEASED = replace(
    tiny_model.CONFIG,
    head_dim=512,
    qk_rope_head_dim=64,
    index_head_dim=128,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn=YarnConfig(factor=16.0, original_max_position_embeddings=65536),
)
CPU = torch.device("cpu")


def released_frequency(pair: int, theta: float, low: int, high: int) -> float:
    """Spec 2.3: kept below `low`, divided by 16 from `high` on, a ramp between."""
    plain = theta ** (-2 * pair / 64)
    ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
    return plain / 16 * ramp + plain * (1 - ramp)


def test_the_released_tables_have_the_specs_ramp_from_15_to_25() -> None:
    rope = Rope(RELEASED, CPU)
    for pair in range(32):
        assert rope.main[pair] == pytest.approx(10000.0 ** (-2 * pair / 64), rel=1e-6)
        expected = released_frequency(pair, 160000.0, 15, 25)
        assert rope.compress[pair] == pytest.approx(expected, rel=1e-6)
    assert rope.main.dtype is rope.compress.dtype is torch.float32


def test_without_yarn_the_compressed_layers_have_a_plain_table() -> None:
    rope = Rope(replace(RELEASED, yarn=None), CPU)
    expected = 160000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(rope.compress.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", (tiny_model.CONFIG, RELEASED), ids=("tiny", "released"))
def test_trailing_pairs_turn_as_complex_numbers(config: ModelConfig) -> None:
    r, d = config.qk_rope_head_dim, config.head_dim
    positions = torch.tensor([0, 1, 5, 127, 4096, 65536])
    frequencies = Rope(config, CPU).compress
    x = torch.randn(len(positions), 3, d, generator=torch.Generator().manual_seed(0))
    turned = rotate_(x.clone(), Rotation.at(positions, frequencies))
    assert torch.equal(turned[..., :-r], x[..., :-r])
    for t, position in enumerate(positions.tolist()):
        for head in range(3):
            for i in range(r // 2):
                a, b = x[t, head, d - r + 2 * i : d - r + 2 * i + 2].tolist()
                angle = float(torch.tensor(float(position)) * frequencies[i])  # float32, as kept
                expected = complex(a, b) * complex(math.cos(angle), math.sin(angle))
                actual = turned[t, head, d - r + 2 * i : d - r + 2 * i + 2].tolist()
                assert actual == pytest.approx([expected.real, expected.imag], abs=2e-6)


def test_position_zero_turns_nothing_and_the_inverse_turns_back() -> None:
    frequencies = Rope(RELEASED, CPU).main
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    still = Rotation.at(torch.zeros(4, dtype=torch.int64), frequencies)
    assert torch.equal(rotate_(x.clone(), still), x)
    by = Rotation.at(torch.tensor([3, 77, 1000, 65536]), frequencies)
    there_and_back = rotate_(rotate_(x.clone(), by), by.inverse())
    torch.testing.assert_close(there_and_back, x, rtol=0, atol=2e-6)


def test_it_is_done_in_place_in_the_tensors_own_dtype() -> None:
    x: Tensor = torch.randn(2, 64).bfloat16()
    by = Rotation.at(torch.tensor([1, 2]), Rope(RELEASED, CPU).main)
    exact = rotate_(x.float(), by)
    assert rotate_(x, by) is x
    assert torch.equal(x, exact.bfloat16())  # one rounding
