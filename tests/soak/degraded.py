"""Traffic over a tier that fails and comes back: right tokens all the time, and it is told.

A worker here, one store in a process of its own, a disk that can fail and a Redis that can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.kvstore.blocking import ColdConfig
from services.kvstore.config import KvStoreConfig
from services.kvstore.disk import DiskConfig
from services.kvstore.redis_link import RedisConfig
from services.kvstore.tier import Tier
from tests.soak.faults import PASSWORD, Redis
from tests.soak.ledger import Ledger, compare
from tests.soak.requests import answer, request
from tests.soak.resident import run_resident
from tests.soak.soak_model import soak_model
from tests.soak.store_process import StoreProcess
from tests.soak.traffic import Session, sessions
from tests.soak.worker import Worker, running_worker

SESSIONS_A_WAVE = 12
SHORTEST_TOKENS = 400
LONGEST_TOKENS = 2000
# As long as a deployment waits for the tiers.
LOAD_SECONDS = 10.0
NOTICED_SECONDS = 60.0
BACK_SECONDS = 60.0


@dataclass(slots=True)
class DegradedReport:
    tier: str
    different_tokens: int = 0
    different_logits: int = 0
    compared_tokens: int = 0
    told: str = ""  # by stat while it lasted
    stored_after: int = 0  # blobs that the tier took once it was back
    seconds_until_back: float = 0.0
    waves: list[str] = field(default_factory=list)


async def degrade(
    tier: Tier,
    store_config: KvStoreConfig,
    fault: Callable[[], AbstractAsyncContextManager[None]],
    *,
    told: str,
) -> DegradedReport:
    """Waves of sessions before, during and after the fault.

    `told`: words that stat must say of the tier while it lasts; empty: nothing need be said.
    """
    report = DegradedReport(tier.name)
    waves = [_wave(number) for number in range(3)]
    oracles = [run_resident(soak_model(), wave) for wave in waves]
    before, during, after = zip(("before", "during", "after"), waves, oracles, strict=True)
    store = await StoreProcess.start(store_config)
    try:
        async with running_worker(store.address, LOAD_SECONDS) as worker:
            await _play(worker, *before, report)
            if not (await _stat(store, tier)).degraded:
                await store.do("flush")
            async with fault(), asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(_until_told(store, tier, told)) if told else None
                # What was said before is asked for again, so that the tier is read as well.
                await _play(worker, *before, report)
                await _play(worker, *during, report)
            if telling is not None:
                report.told = telling.result()
            loop = asyncio.get_running_loop()
            start_seconds = loop.time()
            await _until_back(store, tier)
            report.seconds_until_back = loop.time() - start_seconds
            stored = await _stored_blobs(store, tier)
            await _play(worker, *after, report)
            await store.do("flush")
            report.stored_after = await _stored_blobs(store, tier) - stored
        await store.do("check")
        assert await store.stop() == 0
    finally:
        await store.kill()
    return report


def _wave(number: int) -> list[Session]:
    """Sessions that have some blocks."""
    chosen = sessions(31, 1000 * number, 10 * SESSIONS_A_WAVE, LONGEST_TOKENS)
    return [each for each in chosen if each.num_tokens >= SHORTEST_TOKENS][:SESSIONS_A_WAVE]


async def _play(
    worker: Worker, name: str, wave: Sequence[Session], oracle: Ledger, report: DegradedReport
) -> None:
    """All at once; between two turns of a session the worker gives up what it holds of it."""
    ledger = Ledger()

    async def play(session: Session) -> None:
        answers: list[tuple[int, ...]] = []
        for turn in range(len(session.turns)):
            said, _ = await answer(worker.engine, request(session, answers))
            answers.append(said)
            ledger.answers[session.name, turn] = said
            worker.release(session, answers)

    async with asyncio.TaskGroup() as tasks:
        for session in wave:
            tasks.create_task(play(session))
    ledger.rows = worker.trunk.rows.copy()
    worker.trunk.rows.clear()
    differences = compare(oracle, ledger)
    report.different_tokens += differences.tokens
    report.different_logits += differences.logits
    report.compared_tokens += differences.compared_tokens
    report.waves.append(name)


async def _stat(store: StoreProcess, tier: Tier) -> kvstore_pb2.KvTierStat:
    """As `model1 kv stat` asks."""
    async with rpc.channel(store.address) as channel:
        stat = await kvstore_pb2_grpc.KvAdminStub(channel).Stat(kvstore_pb2.KvStatRequest())
    (found,) = [each for each in stat.tiers if each.tier == tier]
    return found


async def _stored_blobs(store: StoreProcess, tier: Tier) -> int:
    return int((await _stat(store, tier)).stored_blobs)


async def _until_told(store: StoreProcess, tier: Tier, words: str) -> str:
    async with asyncio.timeout(NOTICED_SECONDS):
        while words not in (told := (await _stat(store, tier)).degraded):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return told


async def _until_back(store: StoreProcess, tier: Tier) -> None:
    async with asyncio.timeout(BACK_SECONDS):
        while (await _stat(store, tier)).degraded:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def store_config(directory: Path, disk: Path, redis: Redis) -> KvStoreConfig:
    """A store as deployed: the waits are the product's own."""
    return KvStoreConfig(
        name="degraded",
        address=f"unix:{directory / 'store.sock'}",
        arena_dir=directory / "arena",
        # Two dozen blobs: most of what is read comes from further down.
        ram_bytes=96 << 10,
        disk=DiskConfig(disk, max_bytes=64 << 20, segment_bytes=1 << 20),
        cold=ColdConfig(
            redis=RedisConfig(url=redis.url, password=PASSWORD),
            max_bytes=64 << 20,
            ttl_seconds=3600,
        ),
    )
