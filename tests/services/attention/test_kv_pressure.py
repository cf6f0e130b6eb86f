"""Crowds of turns on a device that is too small for them, with a store that loses and damages."""

import asyncio
import contextlib
import random
import resource

import pytest

from services.attention.kv_cache import KvCacheConfig
from services.errors import RequestCancelled
from services.generation import GenerationRequest
from services.kvstore.tier import Tier
from tests.services.attention.kv_worker import BLOCK, Worker, prompt_of
from tests.services.attention.resident import answer

DOCUMENTS = [prompt_of(1100, seed) for seed in range(4)]


def _prompt(draw: random.Random) -> tuple[int, ...]:
    """Some of a document, and some words of one's own: few of each, so that they come again."""
    document = draw.choice(DOCUMENTS)
    return document[: draw.choice((130, 400, 777, 1100))] + prompt_of(draw.choice((1, 60, 200)))


async def _session(worker: Worker, draw: random.Random) -> None:
    """Turns of odd lengths, each going on from the answer of the last."""
    history = _prompt(draw)
    for _ in range(3):
        num_tokens = draw.choice((1, 5, 9))
        await worker.ask(history, num_tokens, salt=draw.choice(("", "other")))
        history += answer(history, num_tokens).token_ids + prompt_of(draw.choice((1, 33, 140)), 9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_32_at_once_and_whatever_is_lost_the_bits_are_those_of_a_resident_run(
    seed: int,
) -> None:
    draw = random.Random(seed)
    kv = KvCacheConfig(
        resume_every_blocks=draw.choice((1, 2, 8)),
        load_timeout_seconds=draw.choice((0.001, 10)),
        staging_bytes=draw.choice((10**5, 10**9)),
        max_writeback_bytes=draw.choice((10**5, 10**9)),
    )
    worker = Worker(max_tokens=60 * BLOCK, kv=kv)
    store = worker.store

    async def trouble() -> None:
        while True:
            await asyncio.sleep(0.02)
            for key in draw.sample(sorted(store.blobs), k=len(store.blobs) // 20):
                store.damage(key, draw)
            for key in draw.sample(sorted(store.blobs), k=len(store.blobs) // 20):
                del store.blobs[key]
            for key in store.blobs:
                store.tier_of.setdefault(key, draw.choice(list(Tier)))
            store.connected = draw.random() < 0.9
            store.error = RuntimeError("boom") if draw.random() < 0.1 else None
            worker.pool.forget_idle(draw.choice((-1, 1000)))

    async with worker.running():
        troubling = asyncio.create_task(trouble())
        async with asyncio.TaskGroup() as tasks:
            for _ in range(32):
                tasks.create_task(_session(worker, random.Random(draw.randrange(8))))
        troubling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await troubling
        store.error = None
    assert worker.engine.stats().kv.counters.restored_tokens.total() > 0


@pytest.mark.parametrize(
    "num_aborts",
    [
        30,
        pytest.param(200, marks=pytest.mark.slow),
        pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
async def test_aborts_at_random_moments_leak_nothing(num_aborts: int) -> None:
    draw = random.Random(num_aborts)
    worker = Worker(max_tokens=40 * BLOCK, max_sequences=6)
    left = num_aborts
    rss_bytes: list[int] = []

    async def client() -> None:
        nonlocal left
        while left:
            left -= 1
            if left % (num_aborts // 4) == 0:
                rss_bytes.append(_rss_bytes())
            request = GenerationRequest(
                request_id=f"{left}",
                token_ids=_prompt(draw),
                max_tokens=20,
                stop_token_ids=frozenset(),
            )
            with worker.engine.submit(request) as stream:
                how = draw.randrange(3)
                if how == 0:
                    for _ in range(draw.randrange(200)):
                        await asyncio.sleep(0)
                elif how == 1:
                    await asyncio.sleep(draw.choice((0, 0.001, 0.01)))
                    with contextlib.suppress(RequestCancelled):
                        worker.engine.abort(request.request_id)
                        async for _ in stream:
                            pass
                else:
                    async for _ in stream:
                        break
            if draw.random() < 0.05:
                worker.pool.forget_idle(-1)

    async with worker.running():
        for document in DOCUMENTS:
            await worker.ask(document)
        worker.store.delay_s = 0.0005
        async with asyncio.TaskGroup() as tasks:
            for _ in range(12):
                tasks.create_task(client())
        worker.store.delay_s = 0.0
        for document in DOCUMENTS:
            await worker.ask(document)
    counters = worker.engine.stats().counters
    assert counters.cancelled >= num_aborts * 0.7  # the others were faster
    assert counters.failed == 0
    if num_aborts >= 10_000:
        assert rss_bytes[-1] - rss_bytes[1] < 32 * 2**20, rss_bytes


def _rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
