"""An engine on the tiny model with a block store; every answer is compared with the oracle's."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from model1.kv_pool import KVPool
from services.attention.engine import Engine, EngineConfig
from services.attention.kv_cache import KvCacheConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.generation import GenerationRequest, KvUsage
from services.kv_keys import KeyChain, root_key
from tests.services import tiny_model
from tests.services.attention.memory_store import MODEL_DIGEST, MemoryStore
from tests.services.attention.resident import CONTEXT, RecordingTrunk, answer

LIMITS = SchedulerLimits(max_batch_tokens=256, max_sequences=32, max_waiting=64)
BLOCK = 128


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        model = tiny_model.model(CONTEXT)
        self.pool: KVPool = tiny_model.pool(max_sequences, max_tokens, 256, CONTEXT, clock=clock)
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
        assert counters.restored_tokens <= counters.hit_tokens

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

    async def forget_all_but_the_store(self, prompt: tuple[int, ...]) -> None:
        """As if the session had been released."""
        await self.written_back()
        chain = KeyChain(root_key(MODEL_DIGEST, self.pool.layout_digest))
        chain.extend(prompt)
        tails = [chain.tail_key(boundary) for boundary in range(len(chain.body_keys) + 1)]
        assert self.engine.release([*chain.body_keys, *tails]) == len(chain.body_keys)

    async def written_back(self) -> None:
        async with asyncio.timeout(30):
            while self.engine.stats().kv.waiting_blobs:  # noqa: ASYNC110 nobody waits for it
                await asyncio.sleep(0.001)


def prompt_of(num_tokens: int, seed: int = 1) -> tuple[int, ...]:
    return tiny_model.prompt(num_tokens, seed)
