"""Which token is drawn: greedy ties, what top-p and top-k leave, and that a draw repeats."""

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.errors import InvalidRequest
from model1.sampling import SamplingParams, sample

DRAWS = 2000


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    greedy = SamplingParams()
    assert sample(torch.tensor([1.0, 3.0, -2.0, 3.0, 3.0]), greedy, 0) == 1
    assert sample(torch.zeros(7), greedy, 0) == 0
    assert sample(torch.tensor([-math.inf, -1.0]), greedy, 0) == 1


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    logits = torch.linspace(-1, 1, 50)
    params = SamplingParams(temperature=1.0, seed=7)
    drawn = [sample(logits, params, position) for position in range(200)]
    assert [sample(logits, params, position) for position in reversed(range(200))] == drawn[::-1]
    other = SamplingParams(temperature=1.0, seed=8)
    assert [sample(logits, other, position) for position in range(200)] != drawn
    assert len(set(drawn)) > 30


def test_the_order_of_earlier_draws_and_torchs_own_seed_do_not_matter() -> None:
    logits, params = torch.linspace(-1, 1, 50), SamplingParams(temperature=1.0, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = sample(logits, params, 12)
        torch.manual_seed(1)
        sample(logits, params, 4)
        assert sample(logits, params, 12) == first


@pytest.mark.parametrize(
    "cut",
    (
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.7},
    ),
    ids=str,
)
def test_frequencies_are_those_of_the_cut_distribution(cut: dict[str, Any]) -> None:
    """Chi-square over fixed seeds, both over positions and over seeds."""
    logits = torch.tensor([0.0, 1.5, -1.0, 0.7, 2.0, 0.7, -3.0, 1.0])
    settings = {"temperature": 1.0} | cut
    expected = kept_probabilities(logits, **settings)
    by_position = [sample(logits, SamplingParams(seed=11, **settings), p) for p in range(DRAWS)]
    by_seed = [sample(logits, SamplingParams(seed=s, **settings), 5) for s in range(DRAWS)]
    for drawn in (by_position, by_seed):
        chi_square = 0.0
        for token, probability in enumerate(expected):
            if probability == 0.0:
                assert token not in drawn
            else:
                count = DRAWS * probability
                chi_square += (drawn.count(token) - count) ** 2 / count
        assert chi_square < 24.3  # 0.1 % of fair draws with 7 degrees of freedom exceed it


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from((0.3, 1.0, 2.0)),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from((0.001, 0.317, 0.523, 0.891, 1.0)),
    seed=st.integers(-(2**63), 2**64),
)
def test_a_token_that_is_cut_is_never_drawn(
    logits: list[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    values = torch.tensor(logits, dtype=torch.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    kept = kept_probabilities(values, temperature, top_p, top_k)
    for position in range(5):
        assert kept[sample(values, params, position)] > 0


def test_top_k_of_equal_logits_keeps_the_lowest_ids() -> None:
    params = SamplingParams(temperature=1.0, top_k=3, seed=1)
    assert {sample(torch.zeros(9), params, position) for position in range(100)} == {0, 1, 2}


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.85, {0, 1, 2})):
        params = SamplingParams(temperature=1.0, top_p=top_p)
        assert {sample(logits, params, position) for position in range(200)} == kept


@pytest.mark.parametrize("temperature", (1e-4, 1e-300, sys.float_info.min, 5e-324))
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.tensor([-20.0, 30.0, 29.0, -1.0])
    params = SamplingParams(temperature=temperature, seed=2)
    assert {sample(logits, params, position) for position in range(20)} == {1}


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 1.0, -math.inf])
    params = SamplingParams(temperature=1.0)
    assert {sample(logits, params, position) for position in range(50)} == {1, 3}


@pytest.mark.parametrize(
    ("name", "values"),
    (
        ("temperature", (-0.1, 100.5, math.nan, math.inf)),
        ("top_p", (0.0, -1.0, 1.01, math.nan)),
        ("top_k", (-1,)),
    ),
)
def test_parameters_out_of_range_are_told_by_name_and_value(
    name: str, values: tuple[Any, ...]
) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams(**{name: value})
        assert name in str(caught.value)
        assert str(value) in str(caught.value)


def kept_probabilities(
    logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> list[float]:
    """Token by token, in plain floats: softmax, best first, cut to k, cut where p is reached."""
    values = [value / temperature for value in logits.tolist()]
    weights = [math.exp(value - max(values)) for value in values]
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    order = order[: top_k or len(order)]
    total = sum(weights[token] for token in order)
    kept, reached = dict[int, float](), 0.0
    for token in order:
        if reached >= top_p * total:
            break
        kept[token] = weights[token]
        reached += weights[token]
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(values))]
