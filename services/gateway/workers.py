"""The attention workers a gateway can use: their channels, and which one takes the next request.

The table is replaced as a whole by whoever knows the deployment. Knows the internal wire contract
and nothing of clients.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from protos import attention_pb2, attention_pb2_grpc
from services import rpc
from services.errors import InternalFailure, Unavailable, WorkerUnavailable, from_rpc_error
from services.gateway.placement import Candidate, KnownPrefixes, choose
from services.generation import (
    FINISH_REASON_FROM_WIRE,
    FinishReason,
    GenerationRequest,
    KvUsage,
    kv_usage_from_wire,
    request_to_wire,
)

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_SECONDS = 10.0
# A worker answers between two steps.
STATS_TIMEOUT_SECONDS = 5.0
# A worker that refuses at once has the fewest requests under way: every next one would go to it.
AVOIDED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """A row of the table. A worker that was restarted elsewhere is another row."""

    name: str
    address: str
    store: str = ""  # name of its node's KV store; empty: none


@dataclass(frozen=True, slots=True)
class WorkerAccepted:
    """The worker has queued the request; `kv_root` starts the chain of its block keys."""

    kv_root: bytes


@dataclass(frozen=True, slots=True)
class WorkerFinal:
    """There are no more tokens. `kv` is None where the worker could not say."""

    finish_reason: FinishReason
    kv: KvUsage | None


# Accepted, tokens as they come, final.
WorkerEvent: TypeAlias = WorkerAccepted | tuple[int, ...] | WorkerFinal


class Worker:
    """A channel to one attention worker, and the count of this gateway's requests on it."""

    def __init__(self, row: WorkerAddress) -> None:
        self.row = row
        self.num_active = 0
        self.is_retired = False
        self._avoided_until = -math.inf  # on the loop's clock
        self._channel = rpc.channel(row.address)
        self._stub = attention_pb2_grpc.AttentionStub(self._channel)

    @property
    def looks_down(self) -> bool:
        """It could not be reached, or was unavailable a moment ago."""
        return (
            asyncio.get_running_loop().time() < self._avoided_until
            or self._channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE
        )

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None
    ) -> AsyncGenerator[WorkerEvent, None]:
        """The worker's events; closing the iterator early cancels the request there."""
        call = self._stub.Generate(request_to_wire(request), timeout=timeout_s)
        try:
            async for message in call:
                yield _event_from_wire(message)
        except grpc.aio.AioRpcError as error:
            named = from_rpc_error(error)
            if isinstance(named, Unavailable):
                self._avoided_until = asyncio.get_running_loop().time() + AVOIDED_SECONDS
                named = WorkerUnavailable(f"attention worker {self.row.name}: {named}")
            raise named from error
        finally:
            call.cancel()

    async def release(self, keys: Sequence[bytes]) -> int:
        """Give the device memory of these blocks back; how many it held."""
        request = attention_pb2.AttentionReleaseRequest(keys=keys)
        try:
            answer = await self._stub.Release(request, timeout=RELEASE_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise WorkerUnavailable(
                f"attention worker {self.row.name}: {from_rpc_error(error)}"
            ) from error
        return int(answer.blocks)

    async def stats(self) -> attention_pb2.AttentionStatsResponse:
        request = attention_pb2.AttentionStatsRequest()
        try:
            answer: attention_pb2.AttentionStatsResponse = await self._stub.Stats(
                request, timeout=STATS_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            raise WorkerUnavailable(
                f"attention worker {self.row.name}: {from_rpc_error(error)}"
            ) from error
        return answer

    async def close(self) -> None:
        await self._channel.close(grace=None)


class WorkerPool:
    """Owner of the channels to all workers of the table."""

    def __init__(self) -> None:
        self._workers: dict[WorkerAddress, Worker] = {}
        self._known: KnownPrefixes[WorkerAddress] = KnownPrefixes()

    @property
    def all(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    @property
    def table(self) -> tuple[WorkerAddress, ...]:
        return tuple(self._workers)

    async def update(self, table: Iterable[WorkerAddress]) -> None:
        """Use exactly these workers from now on; requests on the others finish there."""
        rows = tuple(table)
        gone = [worker for row, worker in self._workers.items() if row not in rows]
        self._workers = {row: self._workers.get(row) or Worker(row) for row in rows}
        for worker in gone:
            worker.is_retired = True
        await asyncio.gather(*(worker.close() for worker in gone if not worker.num_active))

    @asynccontextmanager
    async def claim(
        self, request: GenerationRequest, *, last_worker: str = ""
    ) -> AsyncIterator[Worker]:
        """The worker for one request; `last_worker` served the turn before."""
        if not self._workers:
            raise WorkerUnavailable("no attention worker is ready")
        worker = self._chosen(request, last_worker)
        worker.num_active += 1
        try:
            yield worker
        finally:
            worker.num_active -= 1
            if worker.is_retired and not worker.num_active:
                await worker.close()

    def store_of(self, worker_name: str) -> str:
        """Name of the KV store of that worker's node; empty if it is not known."""
        stores = (row.store for row in self._workers if row.name == worker_name)
        return next(stores, "")

    def learn(self, worker: Worker, cache_salt: str, token_ids: Sequence[int]) -> None:
        """The worker has the KV of these tokens now."""
        self._known.learn(cache_salt, token_ids, worker.row)

    async def release(self, keys: Sequence[bytes]) -> int:
        """Give the device memory of these blocks back everywhere; how many were held.

        A worker that does not answer is passed over: what it holds goes with it, or by age.
        """
        answers = await asyncio.gather(
            *(worker.release(keys) for worker in self._workers.values()), return_exceptions=True
        )
        blocks = 0
        for answer in answers:
            if isinstance(answer, int):
                blocks += answer
            elif isinstance(answer, WorkerUnavailable):
                log.warning("release_failed why=%s", answer)
            else:
                raise answer
        return blocks

    async def close(self) -> None:
        """Call off what is still active and close every channel."""
        workers = list(self._workers.values())
        self._workers = {}
        await asyncio.gather(*(worker.close() for worker in workers))

    def _chosen(self, request: GenerationRequest, last_worker: str) -> Worker:
        workers = list(self._workers.values())
        known = self._known.worker_of_longest(request.cache_salt, request.token_ids)
        candidates = [
            Candidate(
                num_active=worker.num_active,
                looks_down=worker.looks_down,
                served_last_turn=worker.row.name == last_worker,
                knows_prefix=worker.row == known,
            )
            for worker in workers
        ]
        return workers[choose(candidates)]


def _event_from_wire(message: attention_pb2.AttentionGenerateResponse) -> WorkerEvent:
    match message.WhichOneof("event"):
        case "accepted":
            return WorkerAccepted(message.accepted.kv_root)
        case "tokens":
            return tuple(message.tokens.token_ids)
        case "final" if message.final.finish_reason in FINISH_REASON_FROM_WIRE:
            final = message.final
            kv = kv_usage_from_wire(final.kv) if final.HasField("kv") else None
            return WorkerFinal(FINISH_REASON_FROM_WIRE[final.finish_reason], kv)
        case _:
            raise InternalFailure(f"the attention worker sent an unknown event: {message}")
