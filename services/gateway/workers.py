"""The attention workers a gateway can use: their channels, and which one takes the next request.

The table is replaced as a whole by whoever knows the deployment. Knows the internal wire contract
and nothing of clients.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from protos import attention_pb2, attention_pb2_grpc
from services import rpc
from services.errors import InternalFailure, Unavailable, WorkerUnavailable, from_rpc_error
from services.generation import (
    FINISH_REASON_FROM_WIRE,
    FinishReason,
    GenerationRequest,
    request_to_wire,
)

# A worker that refuses at once has the fewest requests under way: every next one would go to it.
AVOIDED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """A row of the table. A worker that was restarted elsewhere is another row."""

    name: str
    address: str


class WorkerAccepted:
    """The worker has queued the request."""


# Tokens as they come, then the reason why there are no more.
WorkerEvent: TypeAlias = WorkerAccepted | tuple[int, ...] | FinishReason


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

    async def close(self) -> None:
        await self._channel.close(grace=None)


class WorkerPool:
    """Owner of the channels to all workers of the table."""

    def __init__(self) -> None:
        self._workers: dict[WorkerAddress, Worker] = {}

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
    async def claim(self) -> AsyncIterator[Worker]:
        """The worker for one request: least loaded, rather one that can be reached."""
        if not self._workers:
            raise WorkerUnavailable("no attention worker is ready")
        worker = min(self._workers.values(), key=lambda each: (each.looks_down, each.num_active))
        worker.num_active += 1
        try:
            yield worker
        finally:
            worker.num_active -= 1
            if worker.is_retired and not worker.num_active:
                await worker.close()

    async def close(self) -> None:
        """Call off what is still active and close every channel."""
        workers = list(self._workers.values())
        self._workers = {}
        await asyncio.gather(*(worker.close() for worker in workers))


def _event_from_wire(message: attention_pb2.AttentionGenerateResponse) -> WorkerEvent:
    match message.WhichOneof("event"):
        case "accepted":
            return WorkerAccepted()
        case "tokens":
            return tuple(message.tokens.token_ids)
        case "final" if message.final.finish_reason in FINISH_REASON_FROM_WIRE:
            return FINISH_REASON_FROM_WIRE[message.final.finish_reason]
        case _:
            raise InternalFailure(f"the attention worker sent an unknown event: {message}")
