"""A gateway with two attention workers over a tiny model, all real, and a client's stubs to it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from model1.kv_pool import KVPool
from model1.tokenizer import Tokenizer
from protos import (
    control_pb2,
    control_pb2_grpc,
    expert_pb2,
    inference_pb2,
    inference_pb2_grpc,
    sessions_pb2_grpc,
)
from services import rpc
from services.attention.engine import EngineConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.attention.server import AttentionWorker, AttentionWorkerConfig
from services.gateway.operations import Change, ExpertMove, Rebalance
from services.gateway.server import GatewayConfig, GatewayServer
from services.gateway.store import StoreAddress
from services.gateway.topology import Member, Topology
from services.gateway.worker import WorkerAddress
from tests.services import tiny_model

MAX_ACTIVE = 4

MEMBER = Member(
    name="expert-1-0",
    role="expert",
    address="127.0.0.1:4000",
    pid=17,
    node_id="node",
    state="ready",
    requests=5,
    expert_group=1,
    stats=control_pb2.RoleStats(
        requests=5, seconds=2.0, expert=expert_pb2.ExpertStatsResponse(calls=5, busy_seconds=1.5)
    ),
)


async def topology() -> Topology:
    return Topology(3, (MEMBER,))


@dataclass
class StagedOperations:
    """What was asked of the deployment, which does as the test says."""

    asked: list[tuple[object, ...]] = field(default_factory=list)
    fails_with: Exception | None = None

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        return self._done("scale_experts", num_replicas, group)

    async def scale_attention(self, num_workers: int) -> Change:
        return self._done("scale_attention", num_workers)

    async def drain(self, name: str) -> Change:
        return self._done("drain", name)

    async def drain_node(self, node: str) -> Change:
        return self._done("drain_node", node)

    async def rebalance(self, dry_run: bool) -> Rebalance:
        self._done("rebalance", dry_run)
        moves = (ExpertMove("expert-0-1", 3, is_drop=False), ExpertMove("expert-1-1", 3, True))
        return Rebalance(4, moves, balance_before=0.5, balance_after=0.875)

    def _done(self, *asked: object) -> Change:
        self.asked.append(asked)
        if self.fails_with:
            raise self.fails_with
        return Change(4, ("expert-0-1",), ("expert-1-1",))


LIMITS = SchedulerLimits(max_batch_tokens=32, max_sequences=4, max_waiting=8)


async def open_worker(
    name: str, pool: KVPool, store_address: str, limits: SchedulerLimits = LIMITS
) -> AttentionWorker:
    model = tiny_model.model()
    config = AttentionWorkerConfig(
        name=name, engine=EngineConfig(limits=limits), kv_store_address=store_address
    )
    return await AttentionWorker.open(model.trunk, pool, LocalExperts(model.experts), config)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One gateway and two attention workers, with a client's stubs."""

    gateway: GatewayServer
    workers: tuple[AttentionWorker, ...]
    pools: tuple[KVPool, ...]
    tokenizer: Tokenizer
    inference: Any
    control: Any
    sessions: Any
    operations: StagedOperations

    @property
    def num_sequences(self) -> int:
        return sum(pool.usage().sequences for pool in self.pools)

    async def freed(self) -> None:
        async with asyncio.timeout(30):
            while self.num_sequences:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@asynccontextmanager
async def gateway_over(
    folder: Path,
    rows: Sequence[WorkerAddress],
    workers: Sequence[AttentionWorker] = (),
    pools: Sequence[KVPool] = (),
    **settings: Any,
) -> AsyncIterator[Deployment]:
    """A gateway with this table; `settings` are more of its own."""
    model_dir = tiny_model.write_model_dir(folder)
    config = GatewayConfig(
        model_dir=model_dir,
        version="1.2.3",
        address="127.0.0.1:0",
        default_max_tokens=5,
        **{"max_active_requests": MAX_ACTIVE, **settings},
    )
    operations = StagedOperations()
    gateway = await GatewayServer.open(config, topology, operations)
    await gateway.gateway.workers.update(rows)
    async with rpc.channel(gateway.address) as channel:
        yield Deployment(
            gateway,
            tuple(workers),
            tuple(pools),
            Tokenizer.from_dir(model_dir),
            inference_pb2_grpc.InferenceStub(channel),
            control_pb2_grpc.ControlStub(channel),
            sessions_pb2_grpc.SessionsStub(channel),
            operations,
        )
    await gateway.stop(grace_s=0)
    assert gateway.gateway.num_active == 0


@asynccontextmanager
async def deployed(
    folder: Path, store: StoreAddress | None = None, **settings: Any
) -> AsyncIterator[Deployment]:
    """`store` is the KV store of both workers' node; `settings` are more of the gateway's."""
    store_name, store_address = (store.name, store.address) if store else ("", "")
    pools = (tiny_model.pool(), tiny_model.pool())
    names = ["attention-0", "attention-1"]
    workers = [
        await open_worker(name, pool, store_address)
        for name, pool in zip(names, pools, strict=True)
    ]
    rows = [
        WorkerAddress(name, worker.address, store_name)
        for name, worker in zip(names, workers, strict=True)
    ]
    async with gateway_over(folder, rows, workers, pools, **settings) as deployment:
        if store is not None:
            await deployment.gateway.gateway.sessions.stores.update([store])
        yield deployment
    for worker in workers:
        await worker.stop(grace_s=0)
        worker.engine.check()


def request(
    prompt: str | tuple[int, ...] = (5, 6, 7), request_id: str = "", **stopping: Any
) -> inference_pb2.GenerateRequest:
    message = inference_pb2.GenerateRequest(
        request_id=request_id, stopping=inference_pb2.StoppingParams(**stopping)
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """What ended a stream or a unary call."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return raised.value


async def frame(call: Any, kind: str) -> Any:
    message = await anext(aiter(call))
    assert message.WhichOneof("frame") == kind
    return getattr(message, kind)
