"""What the cost model knows before the first request."""

import asyncio

import pytest
from torch import Tensor

from model1.moe import ExpertCall
from services.attention.local import LocalExperts
from services.attention.warm_up import measured_step
from services.errors import ExpertsUnavailable
from tests.services import tiny_model


async def test_a_made_up_prompt_is_measured_and_leaves_nothing() -> None:
    model, pool = tiny_model.model(), tiny_model.pool()
    step = await measured_step(model.trunk, pool, LocalExperts(model.experts), 64)
    assert step is not None
    assert step.num_tokens == 64
    assert 0 < step.seconds < 10
    usage = pool.usage()
    assert (usage.sequences, usage.blocks, usage.cached_blocks) == (0, 0, 0)
    pool.check()


class NoExperts:
    """Refuses, or never answers."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    async def submit(self, call: ExpertCall, timeout_seconds: float) -> asyncio.Future[Tensor]:
        if self._error is not None:
            raise self._error
        return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("error", [ExpertsUnavailable("not yet"), None])
async def test_without_experts_nothing_is_known_and_nothing_is_held(
    error: Exception | None,
) -> None:
    model, pool = tiny_model.model(), tiny_model.pool()
    assert await measured_step(model.trunk, pool, NoExperts(error), 64, timeout_s=0.1) is None
    assert pool.usage().sequences == 0
    pool.check()
