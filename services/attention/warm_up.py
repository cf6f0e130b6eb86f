"""What computing a prompt takes, measured before the first request.

Runs a made-up prompt through the trunk and the experts as they are deployed; keeps nothing of it.
"""

import asyncio
import logging
import time
from typing import NamedTuple

from model1.errors import ModelError
from model1.kv_pool import KVPool
from model1.trunk import Trunk
from services.attention.kv_cache import KvCache, KvCacheConfig
from services.attention.runner import Experts, StepRunner
from services.attention.scheduler import Slice
from services.attention.sequence import Sequence
from services.attention.stats import Counters
from services.errors import ServiceError
from services.generation import GenerationRequest

log = logging.getLogger(__name__)

MAX_TOKENS = 256
NUM_STEPS = 2  # the first one also allocates
# Experts that take longer have other troubles; then the first request is what is measured.
TIMEOUT_S = 10.0


class MeasuredStep(NamedTuple):
    num_tokens: int
    seconds: float


async def measured_step(
    trunk: Trunk,
    pool: KVPool,
    experts: Experts,
    max_batch_tokens: int,
    *,
    timeout_s: float = TIMEOUT_S,
) -> MeasuredStep | None:
    """The last of NUM_STEPS equal steps of a prompt; None if the experts do not answer.

    Before an engine takes over the pool.
    """
    num_tokens = min(MAX_TOKENS, max_batch_tokens, pool.max_sequence_tokens - 1)
    request = GenerationRequest(
        request_id="warm-up",
        token_ids=(0,) * num_tokens,
        max_tokens=1,
        stop_token_ids=frozenset(),
    )
    cache = KvCache(pool, None, KvCacheConfig(), on_change=lambda: None)
    runner = StepRunner(trunk, pool, experts, Counters(), crossing_timeout_s=timeout_s)
    seconds = 0.0
    try:
        async with asyncio.timeout(timeout_s):
            for _ in range(NUM_STEPS):
                sequence = Sequence(request, cache.open(request))
                sequence.claim.take()
                try:
                    start_s = time.perf_counter()
                    await runner.run([Slice(sequence, 0, num_tokens)], deadline_s=None)
                    seconds = time.perf_counter() - start_s
                finally:
                    sequence.claim.give_back()
    except (ServiceError, ModelError, TimeoutError) as error:
        log.warning("prompt_not_measured reason=%s", error or "too slow")
        return None
    return MeasuredStep(num_tokens, seconds)
