"""Owns the stream to one expert replica: which calls are under way on it, what it owes, how long it
takes, and what becomes of its calls when it breaks.

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
from services.histogram import Histogram
from services.router.fading_count import FadingCount
from services.router.hedging import PROBE_INTERVAL_SECONDS, AnswerTimes, Slowness
from services.router.routing import Load
from services.tls import Tls
from services.wire import ExpertRows, Words

# A replica that answered wrongly is passed over for so long, where there is another.
WRONG_ANSWER_PAUSE_SECONDS = 1.0
# Of what a replica counts as sent of late: many crossings pass in it, and what was sent before
# experts moved is soon forgotten.
RECENT_HALF_LIFE_SECONDS = 1.0
# Answers that another replica may better: full, going, or the call came damaged.
_TRY_ANOTHER = {
    grpc.StatusCode.DATA_LOSS.value[0],
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    grpc.StatusCode.UNAVAILABLE.value[0],
}


class ReplicaUnusable(Exception):
    """This replica will not answer the call. The same rows may go to another."""


Answered: TypeAlias = Callable[[Words | Exception], None]


@dataclass(slots=True, eq=False)
class SentCall:
    """A call that a replica owes an answer. Times are on the loop's clock."""

    call_id: int
    num_pairs: int
    work_pairs: int  # what the replica had to compute until its answer, the calls before included
    sent_at: float
    patience_seconds: float
    hidden_size: int
    word: np.dtype[Any]
    answered: Answered | None  # None: nobody waits for it any more

    @property
    def due(self) -> float:
        return self.sent_at + self.patience_seconds


class ReplicaLink:
    """`connected_again` is called whenever a stream to the replica has been opened."""

    def __init__(
        self,
        address: str,
        times: AnswerTimes,
        connected_again: Callable[[], None],
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        # A token of the stream in use: after a break there is another one, perhaps to another
        # process, so that whoever failed on this one may be asked again.
        self.stream: object | None = None
        self.calls = 0
        self.pairs = 0
        self.outstanding_pairs = 0  # also of calls that nobody waits for: it computes them too
        self.breaks = 0
        self.wrong_answers = 0
        self.overdue_calls = 0  # not answered within their patience, whatever came later
        self.answers = Histogram()  # what they took, also those that nobody waited for any more
        self.heard_at = 0.0  # when it answered last
        self._times = times
        self._slowness = Slowness()
        self._recent_pairs = FadingCount(RECENT_HALF_LIFE_SECONDS)
        self._distrusted_until = 0.0
        self._sent_at = 0.0
        self._pending: dict[int, SentCall] = {}  # in the order in which they are answered
        self._num_wanted = 0
        self._retiring = False
        self._connected_again = connected_again
        self._clock_offset_seconds = 0.0  # the replica's clock minus ours
        self._duplex = Duplex[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs](
            address,
            _open_dispatch,
            opened=self._open,
            receive=self._receive,
            broken=self._break,
            tls=tls,
        )

    @property
    def connected(self) -> bool:
        return self._duplex.connected

    @property
    def closed(self) -> bool:
        return self._duplex.closed

    @property
    def slowness(self) -> float:
        """1 is typical."""
        return self._slowness.value

    def is_suspect(self, now: float) -> bool:
        """It should have answered by now, or what it answered was wrong a moment ago."""
        if now < self._distrusted_until:
            return True
        oldest = next(iter(self._pending.values()), None)
        return oldest is not None and oldest.due < now

    def load(self, now: float) -> Load:
        return Load(
            outstanding_pairs=self.outstanding_pairs,
            recent_pairs=self._recent_pairs.value(now),
            slowness=self.slowness,
            is_suspect=self.is_suspect(now),
        )

    def may_be_probed(self, now: float) -> bool:
        return not self._pending and now - self._sent_at >= PROBE_INTERVAL_SECONDS

    async def wait_connected(self) -> None:
        await self._duplex.wait_connected()

    def submit(self, call: ExpertRows, deadline: float | None, answered: Answered) -> SentCall:
        """Send a call; `answered` is called once, later, unless the call is forgotten before.

        `deadline` is on our loop's clock.
        """
        now = self._sent_at = asyncio.get_running_loop().time()
        self.calls += 1
        num_pairs = len(call.row_index)
        self.pairs += num_pairs
        self._recent_pairs.add(num_pairs, now)
        self.outstanding_pairs += num_pairs
        sent = SentCall(
            call_id=self.calls,
            num_pairs=num_pairs,
            work_pairs=self.outstanding_pairs,
            sent_at=now,
            patience_seconds=self._times.patience_seconds(self.outstanding_pairs),
            hidden_size=call.rows.shape[1],
            word=call.rows.dtype,
            answered=answered,
        )
        self._pending[sent.call_id] = sent
        self._num_wanted += 1
        deadline_there = None if deadline is None else deadline + self._clock_offset_seconds
        self._duplex.send(wire.encode_expert_rows(sent.call_id, call, deadline_there))
        return sent

    def forget(self, sent: SentCall) -> None:
        """Nobody waits for it any more. The replica is not told: it reads in order, and so would
        learn of it only after having computed the call."""
        self._no_longer_wanted(sent)

    def retire(self) -> None:
        """Close as soon as nobody waits for an answer; submit no more."""
        self._retiring = True
        if not self._num_wanted:
            self._duplex.cancel()

    async def close(self) -> None:
        await self._duplex.close()
        self._abandon("its link was closed")

    def _no_longer_wanted(self, sent: SentCall) -> Answered | None:
        """Returns whom to tell, once."""
        answered, sent.answered = sent.answered, None
        if answered is not None:
            self._num_wanted -= 1
            if self._retiring and not self._num_wanted:
                self._duplex.cancel()
        return answered

    def _open(self, metadata: grpc.aio.Metadata) -> None:
        # Read later than it was written, so a deadline comes out early by one latency, never late.
        there = float(str(metadata[CLOCK_KEY]))
        loop = asyncio.get_running_loop()
        self._clock_offset_seconds = there - loop.time()
        self.stream = object()
        loop.call_soon(self._connected_again)  # not before the stream counts as connected

    def _receive(self, message: expert_pb2.ExpertOutputs) -> None:
        sent = self._pending.pop(message.call_id, None)
        if sent is None:
            return  # never asked
        self.outstanding_pairs -= sent.num_pairs
        self.heard_at = asyncio.get_running_loop().time()
        answer = self._answer_in(message, sent)
        if not isinstance(answer, Exception):
            seconds = self.heard_at - sent.sent_at
            self.answers.observe(seconds)
            typical_seconds = self._times.typical_seconds(sent.work_pairs)
            if typical_seconds is not None:
                self._slowness.observe(seconds, typical_seconds)
        if answered := self._no_longer_wanted(sent):
            answered(answer)

    def _answer_in(self, message: expert_pb2.ExpertOutputs, sent: SentCall) -> Words | Exception:
        if message.HasField("error"):
            if message.error.code in _TRY_ANOTHER:
                return ReplicaUnusable(f"{self.address}: {message.error.message}")
            return wire.decode_error(message.error)
        try:
            return wire.decode_pair_rows(message, sent.word, sent.num_pairs, sent.hidden_size)
        except wire.MalformedCall as error:
            self.wrong_answers += 1
            self._distrusted_until = self.heard_at + WRONG_ANSWER_PAUSE_SECONDS
            return ReplicaUnusable(f"{self.address} answered wrongly: {error}")

    def _break(self, reason: str) -> None:
        self.breaks += 1
        self.stream = None
        self._abandon(f"its stream broke: {reason}")

    def _abandon(self, reason: str) -> None:
        abandoned, self._pending = self._pending, {}
        self.outstanding_pairs = 0
        if self._retiring:
            self._duplex.cancel()
        for sent in abandoned.values():
            if answered := self._no_longer_wanted(sent):
                answered(ReplicaUnusable(f"{self.address}: {reason}"))


def _open_dispatch(
    channel: grpc.aio.Channel,
) -> grpc.aio.StreamStreamCall[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs]:
    stub = expert_pb2_grpc.ExpertStub(channel)
    stream: grpc.aio.StreamStreamCall[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs]
    stream = stub.Dispatch(wait_for_ready=True)
    return stream
