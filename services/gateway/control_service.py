"""The gRPC edge of what operators ask of a gateway: model1.v1.Control.

What it tells of KV stores and of workers' KV are their own reports, passed on as they came.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc

from model1.config import ModelConfig
from model1.errors import InvalidRequest
from protos import control_pb2, control_pb2_grpc, kvstore_pb2
from services import rpc
from services.errors import Unavailable, ending_with_status
from services.gateway import wire
from services.gateway.gateway import Gateway
from services.gateway.operations import Operations
from services.gateway.store import Store
from services.gateway.topology import TopologySource

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class About:
    """What a gateway says of itself."""

    model_path: str
    model: ModelConfig
    version: str
    metrics_url: str = ""  # empty: there are none


class ControlService(control_pb2_grpc.ControlServicer):
    def __init__(
        self, gateway: Gateway, about: About, topology: TopologySource, operations: Operations
    ) -> None:
        self._gateway = gateway
        self._about = about
        self._topology = topology
        self._operations = operations
        self._start_s = time.monotonic()

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        return control_pb2.GetServerInfoResponse(
            version=self._about.version,
            uptime_seconds=time.monotonic() - self._start_s,
            active_requests=self._gateway.num_active,
            max_active_requests=self._gateway.max_active_requests,
            draining=self._gateway.is_draining,
            metrics_url=self._about.metrics_url,
        )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, context: Context
    ) -> control_pb2.GetModelInfoResponse:
        limits = self._gateway.admission.limits
        model = self._about.model
        return control_pb2.GetModelInfoResponse(
            model_path=self._about.model_path,
            vocab_size=limits.vocab_size,
            max_context_length=limits.max_context_length,
            default_max_tokens=limits.default_max_tokens,
            bos_token_id=model.bos_token_id,
            eos_token_ids=limits.eos_token_ids,
            num_hidden_layers=model.num_hidden_layers,
            n_routed_experts=model.n_routed_experts,
        )

    async def GetTopology(
        self, request: control_pb2.GetTopologyRequest, context: Context
    ) -> control_pb2.GetTopologyResponse:
        async with ending_with_status(context):
            topology = await self._topology()
        return wire.topology_to_wire(topology)

    async def Scale(
        self, request: control_pb2.ScaleRequest, context: Context
    ) -> control_pb2.ScaleResponse:
        async with ending_with_status(context):
            match request.WhichOneof("what"):
                case "experts":
                    asked = request.experts
                    group = asked.group if asked.HasField("group") else None
                    change = await self._operations.scale_experts(asked.replicas, group)
                case "attention":
                    change = await self._operations.scale_attention(request.attention.replicas)
                case _:
                    raise InvalidRequest("what is to be scaled: set experts or attention")
        return control_pb2.ScaleResponse(
            epoch=change.epoch, added=change.added, removed=change.removed
        )

    async def Drain(
        self, request: control_pb2.DrainRequest, context: Context
    ) -> control_pb2.DrainResponse:
        async with ending_with_status(context):
            match request.WhichOneof("what"):
                case "actor":
                    change = await self._operations.drain(request.actor)
                case "node":
                    change = await self._operations.drain_node(request.node)
                case _:
                    raise InvalidRequest("what is to be drained: set actor or node")
        return control_pb2.DrainResponse(
            epoch=change.epoch, removed=change.removed, added=change.added
        )

    async def Rebalance(
        self, request: control_pb2.RebalanceRequest, context: Context
    ) -> control_pb2.RebalanceResponse:
        async with ending_with_status(context):
            done = await self._operations.rebalance(request.dry_run)
        return control_pb2.RebalanceResponse(
            epoch=done.epoch,
            moves=[
                control_pb2.ExpertMove(
                    kind=control_pb2.EXPERT_MOVE_KIND_DROP
                    if move.is_drop
                    else control_pb2.EXPERT_MOVE_KIND_LOAD,
                    replica=move.replica,
                    expert=move.expert,
                )
                for move in done.moves
            ],
            balance_before=done.balance_before,
            balance_after=done.balance_after,
        )

    async def Abort(
        self, request: control_pb2.AbortRequest, context: Context
    ) -> control_pb2.AbortResponse:
        async with ending_with_status(context, request.request_id):
            self._gateway.abort(request.request_id)
        return control_pb2.AbortResponse()

    async def GetKvStats(
        self, request: control_pb2.GetKvStatsRequest, context: Context
    ) -> control_pb2.GetKvStatsResponse:
        gateway = self._gateway
        async with ending_with_status(context):
            stores, workers = await asyncio.gather(
                self._of_each_store(lambda store: store.stat()),
                answers([(worker.row.name, worker.stats()) for worker in gateway.workers.all]),
            )
        return control_pb2.GetKvStatsResponse(
            stores=[
                control_pb2.KvStatOfStore(store=name, unavailable=outcome)
                if isinstance(outcome, str)
                else control_pb2.KvStatOfStore(store=name, stat=outcome)
                for name, outcome in stores
            ],
            workers=[
                control_pb2.KvStatOfWorker(worker=name, unavailable=outcome)
                if isinstance(outcome, str)
                else control_pb2.KvStatOfWorker(worker=name, stat=outcome.kv)
                for name, outcome in workers
            ],
        )

    async def VerifyKv(
        self, request: control_pb2.VerifyKvRequest, context: Context
    ) -> control_pb2.VerifyKvResponse:
        asked = kvstore_pb2.KvVerifyRequest(tier=request.tier, repair=request.repair)
        async with ending_with_status(context):
            outcomes = await self._of_each_store(lambda store: store.verify(asked))
        return control_pb2.VerifyKvResponse(
            stores=[
                control_pb2.VerifiedStore(store=name, unavailable=outcome)
                if isinstance(outcome, str)
                else control_pb2.VerifiedStore(store=name, verified=outcome)
                for name, outcome in outcomes
            ]
        )

    async def EvictKv(
        self, request: control_pb2.EvictKvRequest, context: Context
    ) -> control_pb2.EvictKvResponse:
        asked = kvstore_pb2.KvEvictRequest(tier=request.tier, bytes=request.bytes)
        async with ending_with_status(context):
            outcomes = await self._of_each_store(lambda store: store.evict(asked))
        return control_pb2.EvictKvResponse(
            stores=[
                control_pb2.EvictedStore(store=name, unavailable=outcome)
                if isinstance(outcome, str)
                else control_pb2.EvictedStore(store=name, evicted=outcome)
                for name, outcome in outcomes
            ]
        )

    async def CollectKv(
        self, request: control_pb2.CollectKvRequest, context: Context
    ) -> control_pb2.CollectKvResponse:
        async with ending_with_status(context):
            outcomes = await self._of_each_store(lambda store: store.collect())
        return control_pb2.CollectKvResponse(
            stores=[
                control_pb2.CollectedStore(store=name, unavailable=outcome)
                if isinstance(outcome, str)
                else control_pb2.CollectedStore(store=name, collected=outcome)
                for name, outcome in outcomes
            ]
        )

    async def _of_each_store(
        self, ask: Callable[[Store], Awaitable[Answer]]
    ) -> list[tuple[str, Answer | str]]:
        stores = self._gateway.sessions.stores.all
        return await answers([(store.row.name, ask(store)) for store in stores])


def control_service(service: ControlService) -> rpc.Service:
    return rpc.Service(
        "model1.v1.Control", partial(control_pb2_grpc.add_ControlServicer_to_server, service)
    )


async def answers(
    asked: Iterable[tuple[str, Awaitable[Answer]]],
) -> list[tuple[str, Answer | str]]:
    """What each answers, or why it does not."""
    return list(await asyncio.gather(*(_outcome(name, answer) for name, answer in asked)))


async def _outcome(name: str, asked: Awaitable[Answer]) -> tuple[str, Answer | str]:
    try:
        return name, await asked
    except (Unavailable, InvalidRequest) as error:
        return name, str(error)
