"""A worker and a real KV store in another process, over gRPC and shared memory."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protos import attention_pb2, attention_pb2_grpc, inference_pb2
from services import rpc
from services.attention.engine import EngineConfig
from services.attention.kv_cache import KvCacheConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.attention.server import AttentionWorker, AttentionWorkerConfig
from services.generation import KvUsage, kv_usage_from_wire
from services.kv_keys import KeyChain
from services.kvstore.config import KvStoreConfig
from tests.services import tiny_model
from tests.services.attention.resident import CONTEXT, answer
from tests.services.kvstore.store_process import StoreProcess, running_store

DIGEST = b"tiny-model-00000"
PROMPT = tiny_model.prompt(1000)


@pytest.fixture
def config(tmp_path: Path, socket_address: str) -> KvStoreConfig:
    return KvStoreConfig(
        name="store-0",
        address=socket_address,
        arena_dir=tmp_path / "arena",
        ram_bytes=16 << 20,
    )


@pytest.fixture
def store(config: KvStoreConfig) -> Iterator[StoreProcess]:
    with running_store(config) as store:
        yield store


class Worker:
    """A worker behind its gRPC edge; every answer is compared with the oracle's."""

    def __init__(self, worker: AttentionWorker, stub: attention_pb2_grpc.AttentionStub) -> None:
        self.worker = worker
        self.stub = stub
        self.kv_root = b""

    async def ask(self, prompt: tuple[int, ...], num_tokens: int = 4) -> KvUsage:
        token_ids: list[int] = []
        kv = inference_pb2.KvUsage()
        async for event in self.stub.Generate(
            attention_pb2.AttentionGenerateRequest(
                request_id=secrets.token_hex(8),
                token_ids=prompt,
                top_p=1.0,
                max_tokens=num_tokens,
                cache_salt="tenant",
            )
        ):
            if event.HasField("accepted"):
                self.kv_root = event.accepted.kv_root
            token_ids += event.tokens.token_ids
            kv.MergeFrom(event.tokens.kv)
        assert tuple(token_ids) == answer(prompt, num_tokens).token_ids
        return kv_usage_from_wire(kv)

    async def stats(self) -> attention_pb2.AttentionKvStats:
        return (await self.stub.Stats(attention_pb2.AttentionStatsRequest())).kv

    async def until_saved(self) -> None:
        async with asyncio.timeout(30):
            while (await self.stats()).waiting_blobs:  # noqa: ASYNC110 it is another process
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_worker(address: str) -> AsyncIterator[Worker]:
    model = tiny_model.model(CONTEXT)
    config = AttentionWorkerConfig(
        name="attention-0",
        engine=EngineConfig(
            limits=SchedulerLimits(max_batch_tokens=256, max_sequences=8),
            kv=KvCacheConfig(resume_every_blocks=2, load_timeout_seconds=2.0),
        ),
        kv_store_address=address,
        model_digest=DIGEST,
    )
    pool = tiny_model.pool(8, 64 * 128, 256, CONTEXT)
    worker = await AttentionWorker.open(model.trunk, pool, LocalExperts(model.experts), config)
    async with rpc.channel(worker.address) as channel:
        assert worker._store is not None
        async with asyncio.timeout(30):
            await worker._store.wait_connected()
        yield Worker(worker, attention_pb2_grpc.AttentionStub(channel))
        await worker.stop(grace_s=5)
    worker.engine.check()
    assert pool.usage().blocks == 0


async def test_a_turn_is_resumed_by_another_worker(store: StoreProcess) -> None:
    async with running_worker(store.address) as worker:
        assert await worker.ask(PROMPT, num_tokens=30) == KvUsage(computed_tokens=1000)
    history = PROMPT + answer(PROMPT, 30).token_ids
    turn = history + tiny_model.prompt(50, seed=2)
    async with running_worker(store.address) as worker:
        assert await worker.ask(turn) == KvUsage(ram_tokens=1024, computed_tokens=56)
        stats = await worker.stats()
        assert (stats.asked_tokens, stats.hit.ram, stats.restored.ram) == (1080, 1024, 1024)
        assert stats.computed_tokens == 56


async def test_released_blocks_leave_the_device_and_come_back(store: StoreProcess) -> None:
    async with running_worker(store.address) as worker:
        await worker.ask(PROMPT)
        await worker.until_saved()
        chain = KeyChain(worker.kv_root)
        chain.extend(PROMPT)
        release = attention_pb2.AttentionReleaseRequest(keys=chain.body_keys)
        assert (await worker.stub.Release(release)).blocks == 7
        assert (await worker.stats()).cached_blocks == 0
        assert await worker.ask(PROMPT) == KvUsage(ram_tokens=896, computed_tokens=104)


async def test_a_store_that_dies_costs_the_computing(
    store: StoreProcess, config: KvStoreConfig
) -> None:
    async with running_worker(store.address) as worker:
        await worker.ask(PROMPT)
        store.kill()
        other = tiny_model.prompt(400, seed=3)
        assert await worker.ask(other) == KvUsage(computed_tokens=400)
        assert await worker.ask(other) == KvUsage(device_tokens=384, computed_tokens=16)
        saved = (await worker.stats()).saved_blobs
        with running_store(config):
            async with asyncio.timeout(20):
                seed = 4
                while (await worker.stats()).saved_blobs == saved:
                    await worker.ask(tiny_model.prompt(300, seed))
                    seed += 1


async def test_a_frozen_store_delays_a_request_by_no_more_than_its_patience(
    store: StoreProcess,
) -> None:
    async with running_worker(store.address) as worker:
        await worker.ask(PROMPT)
        await worker.until_saved()
        store.freeze()
        try:
            async with asyncio.timeout(10):
                other = tiny_model.prompt(400, seed=3)
                assert await worker.ask(other) == KvUsage(computed_tokens=400)
        finally:
            store.thaw()
