"""One attention worker as a gateway calls it: its channel, and the streams under way on it.

Knows the internal wire contract and nothing of clients; whether the worker is worth another request
is for others to say.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from protos import attention_pb2, attention_pb2_grpc
from services import rpc
from services.errors import (
    InternalFailure,
    RequestCancelled,
    Unavailable,
    WorkerUnavailable,
    from_rpc_error,
)
from services.generation import (
    FINISH_REASON_FROM_WIRE,
    FinishReason,
    GenerationRequest,
    KvUsage,
    kv_usage_from_wire,
    request_to_wire,
)
from services.tls import Tls

RELEASE_TIMEOUT_SECONDS = 10.0
ABORT_TIMEOUT_SECONDS = 5.0
# A worker answers between two steps.
STATS_TIMEOUT_SECONDS = 5.0


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
class WorkerTokens:
    """The next tokens. `kv` comes with the first: where the KV of the prompt came from."""

    token_ids: tuple[int, ...]
    kv: KvUsage | None


@dataclass(frozen=True, slots=True)
class WorkerFinal:
    """There are no more tokens."""

    finish_reason: FinishReason


# Accepted, tokens as they come, final.
WorkerEvent: TypeAlias = WorkerAccepted | WorkerTokens | WorkerFinal


class Worker:
    """A channel to one attention worker."""

    def __init__(self, row: WorkerAddress, tls: Tls | None = None) -> None:
        self.row = row
        self._tls = tls
        self.heard_s = -math.inf  # on the loop's clock: the last word in any of its streams
        self._calls: set[grpc.aio.UnaryStreamCall[Any, Any]] = set()
        self._given_up_for = ""
        self._channel = rpc.channel(row.address, tls)
        self._stub = attention_pb2_grpc.AttentionStub(self._channel)

    async def generate(
        self, request: GenerationRequest, timeout_s: float | None
    ) -> AsyncGenerator[WorkerEvent, None]:
        """The worker's events; closing the iterator early cancels the request there."""
        call = self._stub.Generate(request_to_wire(request), timeout=timeout_s)
        self._calls.add(call)
        now_s = asyncio.get_running_loop().time
        try:
            async for message in call:
                self.heard_s = now_s()
                yield _event_from_wire(message)
        except grpc.aio.AioRpcError as error:
            named = from_rpc_error(error)
            # A cancel of ours ends in CancelledError. One that comes from there is nobody's: gRPC's
            # server answers so to a call that it has not handed over when it closes.
            if isinstance(named, Unavailable | RequestCancelled):
                named = self._unavailable(named)
            raise named from error
        except asyncio.CancelledError:
            this_task = asyncio.current_task()
            if call in self._calls or (this_task is not None and this_task.cancelling()):
                raise  # whoever reads the stream is to end
            raise self._unavailable(self._given_up_for) from None
        finally:
            self._calls.discard(call)
            call.cancel()

    def give_up(self, why: str) -> None:
        """End every stream under way as unavailable. A worker that is only slow cancels the
        requests as soon as it hears of it."""
        self._given_up_for = why
        calls, self._calls = self._calls, set()
        for call in calls:
            call.cancel()

    async def abort(self, request_id: str) -> None:
        """End the request there, if it lives and the worker can be asked."""
        request = attention_pb2.AttentionAbortRequest(request_id=request_id)
        try:
            await self._stub.Abort(request, timeout=ABORT_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise self._unavailable(from_rpc_error(error)) from error

    async def release(self, keys: Sequence[bytes]) -> int:
        """Give the device memory of these blocks back; how many it held."""
        request = attention_pb2.AttentionReleaseRequest(keys=keys)
        try:
            answer = await self._stub.Release(request, timeout=RELEASE_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self._unavailable(from_rpc_error(error)) from error
        return int(answer.blocks)

    async def stats(self) -> attention_pb2.AttentionStatsResponse:
        return await self._stats(wait_for_ready=False)

    async def takes_requests(self) -> bool:
        """Does it answer, and not that it is draining? Waits a while for it to be there."""
        try:
            return not (await self._stats(wait_for_ready=True)).draining
        except WorkerUnavailable:
            return False

    async def can_be_reached(self, timeout_s: float) -> bool:
        """Is there a process that answers a new connection? gRPC does that in threads of its own:
        a worker in the middle of a long step is there, a frozen one or one without a network is
        not."""
        async with rpc.channel(self.row.address, self._tls) as channel:
            try:
                async with asyncio.timeout(timeout_s):
                    await channel.channel_ready()
            except TimeoutError:
                return False
            return True

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _stats(self, *, wait_for_ready: bool) -> attention_pb2.AttentionStatsResponse:
        request = attention_pb2.AttentionStatsRequest()
        try:
            answer: attention_pb2.AttentionStatsResponse = await self._stub.Stats(
                request, timeout=STATS_TIMEOUT_SECONDS, wait_for_ready=wait_for_ready
            )
        except grpc.aio.AioRpcError as error:
            raise self._unavailable(from_rpc_error(error)) from error
        return answer

    def _unavailable(self, why: object) -> WorkerUnavailable:
        return WorkerUnavailable(f"attention worker {self.row.name}: {why}")


def _event_from_wire(message: attention_pb2.AttentionGenerateResponse) -> WorkerEvent:
    match message.WhichOneof("event"):
        case "accepted":
            return WorkerAccepted(message.accepted.kv_root)
        case "tokens":
            tokens = message.tokens
            kv = kv_usage_from_wire(tokens.kv) if tokens.HasField("kv") else None
            return WorkerTokens(tuple(tokens.token_ids), kv)
        case "final" if message.final.finish_reason in FINISH_REASON_FROM_WIRE:
            return WorkerFinal(FINISH_REASON_FROM_WIRE[message.final.finish_reason])
        case _:
            raise InternalFailure(f"the attention worker sent an unknown event: {message}")
