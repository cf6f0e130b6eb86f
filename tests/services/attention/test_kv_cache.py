"""Restored or computed: tokens and logits are those of a run with everything resident, bit for bit.

The block store is one in memory with real, verified blobs.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from model1.kv_pool import KVPool
from services.attention.engine import Engine, EngineConfig
from services.attention.kv_cache import KvCacheConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.generation import GenerationRequest, KvUsage
from tests.services import tiny_model
from tests.services.attention.memory_store import MODEL_DIGEST, MemoryStore
from tests.services.attention.resident import CONTEXT, RecordingTrunk, answer

LIMITS = SchedulerLimits(max_batch_tokens=256, max_sequences=32, max_waiting=64)
BLOCK = 128
WHOLE_PROMPT = 2000  # of 15 whole blocks that can be restored


class Worker:
    """An engine, its pool, its store, and the bits that it computed."""

    def __init__(
        self,
        *,
        max_tokens: int = 64 * BLOCK,
        max_sequences: int = 32,
        has_store: bool = True,
        kv: KvCacheConfig | None = None,
        store: MemoryStore | None = None,
    ) -> None:
        model = tiny_model.model(CONTEXT)
        self.pool: KVPool = tiny_model.pool(max_sequences, max_tokens, 256, CONTEXT)
        self.store = store or MemoryStore(self.pool.layout_digest)
        self.trunk = RecordingTrunk(model.trunk)
        trunk: Any = self.trunk
        self.engine = Engine(
            trunk,
            self.pool,
            LocalExperts(model.experts),
            EngineConfig(limits=LIMITS, kv=kv or KvCacheConfig(resume_every_blocks=4)),
            store=self.store if has_store else None,
            model_digest=MODEL_DIGEST,
        )
        self._num_requests = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Worker"]:
        running = asyncio.create_task(self.engine.run())
        try:
            yield self
        finally:
            self.engine.close()
            await running
        self.engine.check()
        usage = self.pool.usage()
        assert (usage.sequences, usage.blocks, usage.pinned_blocks) == (0, 0, 0)
        assert self.store.leases == 0
        counters = self.engine.stats().kv.counters
        assert counters.asked_tokens == (
            counters.computed_tokens + sum(counters.restored_tokens.values())
        )
        assert sum(counters.hit_tokens.values()) == (
            sum(counters.restored_tokens.values())
            + counters.skipped_tokens
            + counters.failed_tokens
            + counters.late_tokens
        )

    async def ask(self, prompt: tuple[int, ...], num_tokens: int = 4, salt: str = "") -> KvUsage:
        """Generate, and compare with the oracle."""
        self._num_requests += 1
        request = GenerationRequest(
            request_id=f"{self._num_requests}",
            token_ids=prompt,
            max_tokens=num_tokens,
            stop_token_ids=frozenset(),
            cache_salt=salt,
        )
        token_ids: list[int] = []
        usage: KvUsage | None = None
        with self.engine.submit(request) as stream:
            async for event in stream:
                token_ids += event.token_ids
                usage = event.kv_usage
        expected = answer(prompt, num_tokens)
        assert tuple(token_ids) == expected.token_ids
        self.trunk.assert_drew_from(prompt, expected)
        assert usage is not None
        return usage

    async def forget_device(self) -> None:
        """As if others had needed the memory."""
        await self.written_back()
        self.pool.forget_idle(-1)
        assert self.pool.usage().cached_blocks == 0

    async def written_back(self) -> None:
        async with asyncio.timeout(10):
            while self.engine.stats().kv.waiting_blobs:  # noqa: ASYNC110 nobody waits for it
                await asyncio.sleep(0.001)


def prompt_of(num_tokens: int, seed: int = 1) -> tuple[int, ...]:
    return tiny_model.prompt(num_tokens, seed)


async def test_a_second_prompt_shares_the_blocks_on_the_device() -> None:
    prompt = prompt_of(WHOLE_PROMPT)
    async with Worker(has_store=False).running() as worker:
        first = await worker.ask(prompt)
        again = await worker.ask(prompt)
        longer = await worker.ask(prompt[:1100] + prompt_of(300, seed=2))
        other = await worker.ask(prompt_of(300, seed=3))
    assert first == KvUsage(computed_tokens=WHOLE_PROMPT)
    assert again == KvUsage(device_tokens=1920, computed_tokens=80)
    assert longer == KvUsage(device_tokens=1024, computed_tokens=376)  # 1024: a resume point
    assert other == KvUsage(computed_tokens=300)


async def test_what_the_device_gave_up_comes_back_from_the_store() -> None:
    prompt = prompt_of(WHOLE_PROMPT)
    async with Worker().running() as worker:
        await worker.ask(prompt, num_tokens=140)  # decodes over a boundary: 2048
        await worker.forget_device()
        history = prompt + answer(prompt, 140).token_ids
        turn = history + prompt_of(30, seed=2)
        assert await worker.ask(turn) == KvUsage(ram_tokens=2048, computed_tokens=122)
        await worker.forget_device()
        elsewhere = Worker(store=worker.store)
        async with elsewhere.running():
            usage = await elsewhere.ask(turn + prompt_of(200, seed=3), num_tokens=2)
            assert usage == KvUsage(ram_tokens=2048, computed_tokens=322)


async def filled_store(prompt: tuple[int, ...]) -> MemoryStore:
    async with Worker().running() as worker:
        await worker.ask(prompt)
    return worker.store


async def restored(store: MemoryStore, prompt: tuple[int, ...]) -> KvUsage:
    """By a worker that holds nothing."""
    async with Worker(store=store).running() as worker:
        return await worker.ask(prompt)


@pytest.mark.parametrize(
    ("damaged", "num_computed"),
    [
        ((), 0),
        ((9,), 2),  # resumes at block 8, computes 8 and 9, and jumps to the last boundary
        ((14,), 3),
        ((1, 6, 14), 2 + 3 + 3),
        ((0, 3, 4, 7, 8, 11, 12), 4 + 4 + 4 + 1),
    ],
)
async def test_damaged_blocks_are_computed_again_and_nothing_else(
    damaged: tuple[int, ...], num_computed: int
) -> None:
    prompt, draw = prompt_of(WHOLE_PROMPT), random.Random(1)
    store = await filled_store(prompt)
    bodies, whole = store.bodies(), set(store.blobs)
    assert len(bodies) == 15
    for index in damaged:
        store.damage(bodies[index], draw)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=(15 - num_computed) * BLOCK, computed_tokens=num_computed * BLOCK + 80
    )
    assert set(store.blobs) == whole  # what was computed again is kept again
    assert await restored(store, prompt) == KvUsage(ram_tokens=1920, computed_tokens=80)


async def test_tails_that_are_gone_cost_the_way_from_the_one_before() -> None:
    prompt, draw = prompt_of(WHOLE_PROMPT), random.Random(1)
    store = await filled_store(prompt)
    tails = store.tails()
    assert len(tails) == 4  # after 4, 8 and 12 blocks, and after 15
    store.damage(tails[-1], draw)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=12 * BLOCK, computed_tokens=3 * BLOCK + 80
    )
    for tail in tails[1:]:
        store.damage(tail, draw)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=4 * BLOCK, computed_tokens=11 * BLOCK + 80
    )


async def test_prompts_with_another_salt_share_nothing() -> None:
    prompt = prompt_of(700)
    async with Worker().running() as worker:
        await worker.ask(prompt, salt="one")
        assert await worker.ask(prompt, salt="other") == KvUsage(computed_tokens=700)
        await worker.forget_device()
        assert await worker.ask(prompt) == KvUsage(computed_tokens=700)
        assert await worker.ask(prompt, salt="one") == KvUsage(ram_tokens=640, computed_tokens=60)
