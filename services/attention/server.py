"""The gRPC edge of an attention worker, and its life from listening to closed.

Knows the wire and the engine's surface; nothing of what a step is.
"""

import asyncio
import logging
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import grpc

from model1.errors import InvalidRequest
from model1.kv_pool import KVPool
from model1.trunk import Trunk
from protos import attention_pb2, attention_pb2_grpc
from services import rpc
from services.attention.cost_model import Source
from services.attention.engine import Engine, EngineConfig
from services.attention.runner import Experts
from services.attention.stats import EngineStats, KvStats
from services.attention.warm_up import measured_step
from services.errors import ending_with_status
from services.generation import FINISH_REASON_TO_WIRE, kv_usage_to_wire, request_from_wire
from services.kv_keys import DIGEST_BYTES
from services.kvstore.client import KvClient, KvClientConfig
from services.tls import Tls

log = logging.getLogger(__name__)

# After the engine has ended every request, its handlers only have a last message to hand over.
HANDLERS_GRACE_S = 1.0

GenerateContext: TypeAlias = grpc.aio.ServicerContext[
    attention_pb2.AttentionGenerateRequest, attention_pb2.AttentionGenerateResponse
]


class AttentionService(attention_pb2_grpc.AttentionServicer):
    """model1.v1.Attention over an engine that someone else runs."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        self._engine = engine
        self._name = name

    async def Generate(
        self, request: attention_pb2.AttentionGenerateRequest, context: GenerateContext
    ) -> None:
        async with ending_with_status(context, request.request_id):
            generation = request_from_wire(request)
            with self._engine.submit(generation, _deadline_s(context)) as stream:
                await context.write(
                    attention_pb2.AttentionGenerateResponse(
                        accepted=attention_pb2.AttentionAccepted(kv_root=stream.kv_root)
                    )
                )
                has_begun = False
                async for event in stream:
                    if event.token_ids:
                        kv = None if has_begun else kv_usage_to_wire(event.kv_usage)
                        tokens = attention_pb2.AttentionTokens(token_ids=event.token_ids, kv=kv)
                        await context.write(attention_pb2.AttentionGenerateResponse(tokens=tokens))
                        has_begun = True
                    if event.finish_reason is not None:
                        final = attention_pb2.AttentionFinal(
                            finish_reason=FINISH_REASON_TO_WIRE[event.finish_reason]
                        )
                        await context.write(attention_pb2.AttentionGenerateResponse(final=final))

    async def Abort(
        self,
        request: attention_pb2.AttentionAbortRequest,
        context: grpc.aio.ServicerContext[
            attention_pb2.AttentionAbortRequest, attention_pb2.AttentionAbortResponse
        ],
    ) -> attention_pb2.AttentionAbortResponse:
        async with ending_with_status(context, request.request_id):
            self._engine.abort(request.request_id)
        return attention_pb2.AttentionAbortResponse()

    async def Stats(
        self,
        request: attention_pb2.AttentionStatsRequest,
        context: grpc.aio.ServicerContext[
            attention_pb2.AttentionStatsRequest, attention_pb2.AttentionStatsResponse
        ],
    ) -> attention_pb2.AttentionStatsResponse:
        engine = self._engine.stats()
        crossing, wait = engine.counters.crossing_times(request.crossing_rows or None)
        stats = _stats_to_wire(self._name, engine)
        stats.crossing_seconds_p50, stats.crossing_seconds_p99 = crossing.p50, crossing.p99
        stats.crossing_wait_seconds_p50, stats.crossing_wait_seconds_p99 = wait.p50, wait.p99
        return stats

    async def Drain(
        self,
        request: attention_pb2.AttentionDrainRequest,
        context: grpc.aio.ServicerContext[
            attention_pb2.AttentionDrainRequest, attention_pb2.AttentionDrainResponse
        ],
    ) -> attention_pb2.AttentionDrainResponse:
        async with ending_with_status(context):
            grace_s = request.grace_seconds
            if not grace_s >= 0:  # NaN would disorder the timers of the whole loop
                raise InvalidRequest(f"grace_seconds must be 0 or more, not {grace_s}")
            aborted = await self._engine.drain(grace_s)
        return attention_pb2.AttentionDrainResponse(aborted_requests=aborted)

    async def Release(
        self,
        request: attention_pb2.AttentionReleaseRequest,
        context: grpc.aio.ServicerContext[
            attention_pb2.AttentionReleaseRequest, attention_pb2.AttentionReleaseResponse
        ],
    ) -> attention_pb2.AttentionReleaseResponse:
        async with ending_with_status(context):
            num_blocks = self._engine.release(request.keys)
        return attention_pb2.AttentionReleaseResponse(blocks=num_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWorkerConfig:
    """Who the worker is and what it may use."""

    name: str
    address: str = "127.0.0.1:0"
    engine: EngineConfig = field(default_factory=EngineConfig)
    # Of the KV store of the worker's node; empty: there is none.
    kv_store_address: str = ""
    # Of the checkpoint that is served: blocks of other models are of no use.
    model_digest: bytes = bytes(DIGEST_BYTES)
    tls: Tls | None = None


class AttentionWorker:
    """A listening worker: owner of its engine, the engine's task, the server and its connection
    to the KV store."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        running: "asyncio.Task[None]",
        server: rpc.RunningServer,
        store: KvClient | None,
    ) -> None:
        self.engine = engine
        self.address = server.address
        self._name = name
        self._running = running
        self._server = server
        self._store = store

    @classmethod
    async def open(
        cls, trunk: Trunk, pool: KVPool, experts: Experts, config: AttentionWorkerConfig
    ) -> "AttentionWorker":
        """Listen and serve. The worker takes over the pool; the experts stay the caller's.

        Does not wait for the KV store: as long as it is away, the worker does without.
        """
        async with AsyncExitStack() as opened:
            store = await _open_store(pool, config)
            if store is not None:
                opened.push_async_callback(store.close)
            step = None
            if store is not None:
                limits = config.engine.limits
                step = await measured_step(trunk, pool, experts, limits.max_batch_tokens)
            engine = Engine(
                trunk, pool, experts, config.engine, store=store, model_digest=config.model_digest
            )
            if step is not None:
                engine.observe_step(*step)
            servicer = AttentionService(engine, name=config.name)
            register = partial(attention_pb2_grpc.add_AttentionServicer_to_server, servicer)
            server = await rpc.start_server(
                [rpc.Service("model1.v1.Attention", register)], config.address, tls=config.tls
            )
            opened.pop_all()
        running = asyncio.create_task(_run(engine, server, config.name), name=config.name)
        return cls(config.name, engine, running, server, store)

    def stats(self) -> attention_pb2.AttentionStatsResponse:
        """What it says of itself; inside its event loop."""
        return _stats_to_wire(self._name, self.engine.stats())

    async def stop(self, grace_s: float) -> None:
        """Stop admitting, finish until `grace_s`, abort the rest, close."""
        await self._server.set_serving(False)
        await self.engine.drain(grace_s)
        await self._server.stop(HANDLERS_GRACE_S)
        self.engine.close()
        await self._running
        if self._store is not None:
            await self._store.close()


async def _open_store(pool: KVPool, config: AttentionWorkerConfig) -> KvClient | None:
    if not config.kv_store_address:
        return None
    return await KvClient.open(
        KvClientConfig(
            address=config.kv_store_address,
            name=config.name,
            model_digest=config.model_digest,
            layout_digest=pool.layout_digest,
            tls=config.tls,
        )
    )


async def _run(engine: Engine, server: rpc.RunningServer, name: str) -> None:
    """The engine's life. It fails by a bug only: then every request has ended, and health tells."""
    try:
        await engine.run()
    except Exception:
        log.exception("engine_failed worker=%s", name)
        await server.set_serving(False)


def _stats_to_wire(name: str, stats: EngineStats) -> attention_pb2.AttentionStatsResponse:
    """All but the percentiles, which take milliseconds of the engine's loop."""
    counters = stats.counters
    return attention_pb2.AttentionStatsResponse(
        worker=name,
        draining=stats.draining,
        waiting_sequences=stats.waiting_sequences,
        running_sequences=stats.running_sequences,
        accepted_requests=counters.accepted,
        finished_requests=counters.finished,
        cancelled_requests=counters.cancelled,
        failed_requests=counters.failed,
        steps=counters.steps,
        prompt_tokens=counters.prompt_tokens,
        completion_tokens=counters.completion_tokens,
        largest_batch_tokens=counters.largest_batch_tokens,
        layer_crossings=counters.layer_crossings,
        kv=_kv_stats_to_wire(stats.kv),
        crossing_seconds=counters.crossing_seconds.to_wire(),
        crossing_wait_seconds=counters.crossing_wait_seconds.to_wire(),
        queue_seconds=counters.queue_seconds.to_wire(),
        first_token_seconds=counters.first_token_seconds.to_wire(),
        step_seconds=counters.step_seconds.to_wire(),
        filled_seconds=counters.filled_seconds,
        oldest_waiting_seconds=stats.oldest_waiting_seconds,
        overlapped_steps=counters.overlapped_steps,
        overlap=[
            attention_pb2.AttentionOverlap(
                max_tokens=size.max_tokens,
                has_prompts=size.has_prompts,
                micro_batches=choice.micro_batches,
                ratio=choice.ratio,
                wait_share=choice.wait_share,
            )
            for size, choice in sorted(stats.overlap.items())
        ],
    )


def _kv_stats_to_wire(stats: KvStats) -> attention_pb2.AttentionKvStats:
    counters = stats.counters
    return attention_pb2.AttentionKvStats(
        asked_tokens=counters.asked_tokens,
        hit=_tier_tokens(counters.hit_tokens),
        restored=_tier_tokens(counters.restored_tokens),
        computed_tokens=counters.computed_tokens,
        skipped_tokens=counters.skipped_tokens,
        failed_tokens=counters.failed_tokens,
        late_tokens=counters.late_tokens,
        saved_blobs=counters.saved_blobs,
        dropped_blobs=counters.dropped_blobs,
        waiting_blobs=stats.waiting_blobs,
        held_blocks=stats.held_blocks,
        cached_blocks=stats.cached_blocks,
        max_blocks=stats.max_blocks,
        pool_bytes=stats.pool_bytes,
    )


def _tier_tokens(tokens: Counter[Source]) -> attention_pb2.AttentionTierTokens:
    return attention_pb2.AttentionTierTokens(
        device=tokens[Source.DEVICE],
        ram=tokens[Source.RAM],
        disk=tokens[Source.DISK],
        peer=tokens[Source.PEER],
        cold=tokens[Source.COLD],
    )


def _deadline_s(context: GenerateContext) -> float | None:
    """The client's deadline on the loop's clock."""
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s
