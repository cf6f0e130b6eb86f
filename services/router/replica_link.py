"""Owns the stream to one expert replica: which calls are under way on it, what it owes, and what
becomes of them when it breaks.

Knows neither the routing table nor the crossings that its calls are parts of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np

from protos import expert_pb2, expert_pb2_grpc
from services import wire
from services.duplex import CLOCK_KEY, Duplex
from services.router.routing import Load
from services.wire import ExpertRows, Words

# Answers that another replica may better: full, or going.
_TRY_ANOTHER = {
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    grpc.StatusCode.UNAVAILABLE.value[0],
}


class ReplicaUnusable(Exception):
    """This replica will not answer the call. The same rows may go to another."""


Answered: TypeAlias = Callable[[Words | Exception], None]


@dataclass(slots=True, eq=False)
class _PendingCall:
    num_pairs: int
    hidden_size: int
    word: np.dtype[Any]
    answered: Answered


class ReplicaLink:
    """`connected_again` is called whenever a stream to the replica has been opened."""

    def __init__(self, address: str, connected_again: Callable[[], None]) -> None:
        self.address = address
        # A token of the stream in use: after a break there is another one, perhaps to another
        # process, so that whoever failed on this one may be asked again.
        self.stream: object | None = None
        self.calls = 0
        self.pairs = 0
        self.outstanding_pairs = 0
        self.breaks = 0
        self._pending: dict[int, _PendingCall] = {}
        self._retiring = False
        self._connected_again = connected_again
        self._clock_offset_seconds = 0.0  # the replica's clock minus ours
        self._duplex = Duplex[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs](
            address,
            _open_dispatch,
            opened=self._open,
            receive=self._receive,
            broken=self._break,
        )

    @property
    def connected(self) -> bool:
        return self._duplex.connected

    @property
    def closed(self) -> bool:
        return self._duplex.closed

    @property
    def load(self) -> Load:
        return Load(self.outstanding_pairs, self.pairs)

    async def wait_connected(self) -> None:
        await self._duplex.wait_connected()

    def submit(self, call: ExpertRows, deadline: float | None, answered: Answered) -> int:
        """Send a call; `answered` is called once, later, unless the call is forgotten before.

        `deadline` is on our loop's clock. Returns the call's id.
        """
        self.calls += 1
        call_id = self.calls
        num_pairs = len(call.row_index)
        self.pairs += num_pairs
        self.outstanding_pairs += num_pairs
        self._pending[call_id] = _PendingCall(
            num_pairs, call.rows.shape[1], call.rows.dtype, answered
        )
        deadline_there = None if deadline is None else deadline + self._clock_offset_seconds
        self._duplex.send(wire.encode_expert_rows(call_id, call, deadline_there))
        return call_id

    def forget(self, call_id: int) -> None:
        """Nobody waits for it any more. The replica is not told: it reads in order, and so would
        learn of it only after having computed the call."""
        self._remove(call_id)

    def retire(self) -> None:
        """Close as soon as nothing is under way; submit no more."""
        self._retiring = True
        if not self._pending:
            self._duplex.cancel()

    async def close(self) -> None:
        await self._duplex.close()
        self._abandon("its link was closed")

    def _remove(self, call_id: int) -> _PendingCall | None:
        pending = self._pending.pop(call_id, None)
        if pending:
            self.outstanding_pairs -= pending.num_pairs
            if self._retiring and not self._pending:
                self._duplex.cancel()
        return pending

    def _open(self, metadata: grpc.aio.Metadata) -> None:
        # Read later than it was written, so a deadline comes out early by one latency, never late.
        there = float(str(metadata[CLOCK_KEY]))
        loop = asyncio.get_running_loop()
        self._clock_offset_seconds = there - loop.time()
        self.stream = object()
        loop.call_soon(self._connected_again)  # not before the stream counts as connected

    def _receive(self, message: expert_pb2.ExpertOutputs) -> None:
        pending = self._remove(message.call_id)
        if pending is None:
            return  # forgotten while the answer was on its way
        if message.HasField("error"):
            if message.error.code in _TRY_ANOTHER:
                pending.answered(ReplicaUnusable(f"{self.address}: {message.error.message}"))
            else:
                pending.answered(wire.decode_error(message.error))
            return
        try:
            pair_rows = wire.decode_pair_rows(
                message, pending.word, pending.num_pairs, pending.hidden_size
            )
        except wire.MalformedCall as error:
            pending.answered(ReplicaUnusable(f"{self.address} answered wrongly: {error}"))
        else:
            pending.answered(pair_rows)

    def _break(self, reason: str) -> None:
        self.breaks += 1
        self.stream = None
        self._abandon(f"its stream broke: {reason}")

    def _abandon(self, reason: str) -> None:
        abandoned, self._pending = self._pending, {}
        self.outstanding_pairs = 0
        if self._retiring:
            self._duplex.cancel()
        for pending in abandoned.values():
            pending.answered(ReplicaUnusable(f"{self.address}: {reason}"))


def _open_dispatch(
    channel: grpc.aio.Channel,
) -> grpc.aio.StreamStreamCall[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs]:
    stub = expert_pb2_grpc.ExpertStub(channel)
    stream: grpc.aio.StreamStreamCall[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs]
    stream = stub.Dispatch(wait_for_ready=True)
    return stream
