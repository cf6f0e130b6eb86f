"""Load or compute, from what was measured."""

import pytest

from services.attention.cost_model import MIN_MEASURED_TOKENS, CostModel, Places, Source, free_plan
from services.attention.restore_plan import Compute, Load
from services.kvstore.tier import Tier, TierCost

RAM, COLD = Source.RAM, Source.COLD
ALL_IN_RAM = Places([RAM] * 4, [None, None, None, RAM])


def _model(seconds_per_block: float = 1.0) -> CostModel:
    model = CostModel(block_tokens=100, body_nbytes=10, tail_nbytes=20)
    model.observe_step(100, seconds_per_block)
    return model


def test_a_tier_is_asked_only_if_it_is_faster_than_computing() -> None:
    model = _model()
    fast = {Tier.RAM: TierCost(latency_seconds=0.1, bytes_per_second=100.0)}
    slow = {Tier.RAM: TierCost(latency_seconds=0.1, bytes_per_second=12.0)}
    late = {Tier.RAM: TierCost(latency_seconds=3.5, bytes_per_second=100.0)}
    assert model.plan(ALL_IN_RAM, fast).segments == (Load(0, 4),)
    assert model.plan(ALL_IN_RAM, fast).seconds == pytest.approx(0.1 + 4 * 0.1 + 0.2)
    assert model.plan(ALL_IN_RAM, slow).segments == (Compute(0, 4),)
    assert model.plan(ALL_IN_RAM, late).segments == (Compute(0, 4),)


def test_a_farther_tier_must_be_worth_its_latency_as_a_whole() -> None:
    costs = {
        Tier.RAM: TierCost(latency_seconds=0.0, bytes_per_second=1000.0),
        Tier.COLD: TierCost(latency_seconds=2.5, bytes_per_second=1000.0),
    }
    short = Places([RAM, RAM, COLD, COLD], [None, RAM, None, COLD])
    long = Places([RAM, RAM, *[COLD] * 4], [None, RAM, None, None, None, COLD])
    assert _model().plan(short, costs).segments == (Load(0, 2), Compute(2, 4))
    assert _model().plan(long, costs).segments == (Load(0, 6),)


def test_what_is_on_the_device_costs_nothing_and_nothing_measured_means_load() -> None:
    device = Places([Source.DEVICE] * 3, [None, Source.DEVICE, None])
    assert _model().plan(device, {}).segments == (Load(0, 2), Compute(2, 3))
    unmeasured = CostModel(block_tokens=100, body_nbytes=10, tail_nbytes=20)
    unmeasured.observe_step(MIN_MEASURED_TOKENS - 1, 1e-9)  # a decode step says nothing
    assert unmeasured.plan(ALL_IN_RAM, {}).segments == (Load(0, 4),)
    assert unmeasured.plan(Places([], []), {}).segments == ()


def test_computing_is_learnt_from_steps_and_follows_their_change() -> None:
    model = _model(seconds_per_block=1.0)
    assert model.compute_seconds(3) == pytest.approx(3.0)
    for _ in range(50):
        model.observe_step(200, 8.0)
    assert model.compute_seconds(1) == pytest.approx(4.0, rel=0.01)


def test_the_free_plan_loads_whatever_is_of_use() -> None:
    places = Places([RAM, None, COLD, RAM], [RAM, None, None, COLD])
    assert free_plan(places).segments == (Load(0, 1), Compute(1, 2), Load(2, 4))
