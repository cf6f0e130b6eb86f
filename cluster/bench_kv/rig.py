"""What the parts of the benchmark share: one model, engines over it, and answers with their times.

Every engine has a KV pool of its own, as a worker has; trunk and experts are loaded once.
"""

import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bench_kv.store_process import BenchStore
from model1.checkpoint import checkpoint_digest, load_experts
from model1.config import ModelConfig
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVLayout
from model1.kv_pool import KVPool
from model1.modules import packed
from services.attention.engine import Engine, EngineConfig
from services.attention.kv_cache import KvCacheConfig
from services.attention.loading import load_trunk_and_pool
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.generation import GenerationRequest, KvUsage
from services.kv_keys import KeyChain
from services.kvstore.client import KvClient, KvClientConfig

CONNECT_TIMEOUT_SECONDS = 10.0
MAX_STEP_TOKENS = 512

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one request. Times in seconds from its submission."""

    token_ids: Tokens
    first_token_seconds: float
    last_token_seconds: float
    kv_usage: KvUsage
    kv_root: bytes

    @property
    def seconds_per_token(self) -> float:
        """Of the tokens after the first."""
        return (self.last_token_seconds - self.first_token_seconds) / (len(self.token_ids) - 1)


class Worker:
    """An engine that runs."""

    def __init__(self, engine: Engine, pool: KVPool) -> None:
        self.pool = pool
        self._engine = engine
        self._numbers = itertools.count()

    async def answer(self, token_ids: Sequence[int], max_tokens: int) -> Answer:
        request = GenerationRequest(
            request_id=f"bench-{next(self._numbers)}",
            token_ids=tuple(token_ids),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(),
        )
        arrivals: list[float] = []
        answered: list[int] = []
        usage: KvUsage | None = None
        started = time.perf_counter()
        with self._engine.submit(request) as stream:
            async for event in stream:
                arrivals += [time.perf_counter() - started] * len(event.token_ids)
                answered += event.token_ids
                usage = event.kv_usage
        assert usage is not None
        return Answer(tuple(answered), arrivals[0], arrivals[-1], usage, stream.kv_root)

    async def written_back(self) -> None:
        """Until the store has all that was computed."""
        while self._engine.stats().kv.waiting_blobs:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.002)


class Rig:
    """The mini model, and the store of the node."""

    def __init__(self, directory: Path, store: BenchStore) -> None:
        smallest = PoolCapacity(1, 1, 1)  # of a pool that is thrown away
        self.store = store
        self._trunk, _ = load_trunk_and_pool(
            directory, dtype="bfloat16", device="cpu", capacity=smallest
        )
        every_expert = range(self._trunk.config.n_routed_experts)
        self._bank = packed(load_experts(directory, every_expert, self._trunk.dtype, "cpu"))
        self._digest = checkpoint_digest(directory)

    @property
    def config(self) -> ModelConfig:
        return self._trunk.config

    def pool(self, capacity: PoolCapacity) -> KVPool:
        return KVPool(self.config, capacity, self._trunk.dtype)

    def pool_bytes(self, capacity: PoolCapacity) -> int:
        """That a pool of this capacity takes on the device."""
        return capacity.num_bytes(KVLayout.of(self.config, self._trunk.dtype))

    @asynccontextmanager
    async def client(self, layout_digest: bytes) -> AsyncIterator[KvClient]:
        client = await KvClient.open(
            KvClientConfig(
                address=self.store.address,
                name="bench",
                model_digest=self._digest,
                layout_digest=layout_digest,
            )
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await client.wait_connected()
            yield client
        finally:
            await client.close()

    @asynccontextmanager
    async def worker(
        self,
        capacity: PoolCapacity,
        *,
        with_store: bool = True,
        kv: KvCacheConfig | None = None,
    ) -> AsyncIterator[Worker]:
        """A worker that has seen nothing yet."""
        pool = self.pool(capacity)
        config = EngineConfig(
            limits=SchedulerLimits(
                max_batch_tokens=capacity.max_step_tokens, max_sequences=capacity.max_sequences
            ),
            kv=kv or KvCacheConfig(),
        )
        async with AsyncExitStack() as parts:
            store = None
            if with_store:
                store = await parts.enter_async_context(self.client(pool.layout_digest))
            engine = Engine(
                self._trunk,
                pool,
                LocalExperts(self._bank),
                config,
                store=store,
                model_digest=self._digest,
            )
            running = asyncio.create_task(engine.run())
            try:
                yield Worker(engine, pool)
            finally:
                engine.close()
                await running


def keys_of(kv_root: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """Of all blobs that there may be of a history: bodies and tails."""
    chain = KeyChain(kv_root)
    chain.extend(token_ids)
    tails = [chain.tail_key(index + 1) for index in range(len(chain.body_keys))]
    return [*chain.body_keys, *tails]


def random_tokens(num_tokens: int, vocab_size: int, seed: str) -> Tokens:
    draw = random.Random(seed)
    return tuple(draw.randrange(vocab_size) for _ in range(num_tokens))


def p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)
