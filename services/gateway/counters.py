"""What a gateway counts of its requests. Each is received once and has one outcome in the end.

Knows neither who asks nor who is told.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from model1.errors import InvalidRequest
from services.errors import (
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    QueueFull,
    RequestCancelled,
    SessionBusy,
    SessionsOff,
)
from services.gateway.answer import Final
from services.histogram import Histogram


class Outcome(StrEnum):
    """How a request ended."""

    FINISHED = "finished"  # its answer is complete
    # Its client left, its deadline passed or it was aborted. One outcome for the three: which of
    # the first two is noticed first is chance.
    CANCELLED = "cancelled"
    REJECTED = "rejected"  # turned away before a worker had queued it: invalid, or no room
    FAILED = "failed"  # anything else


_CANCELLED = (asyncio.CancelledError, RequestCancelled, DeadlineExceeded)
_REJECTED = (InvalidRequest, DuplicateRequest, QueueFull, Draining, SessionBusy, SessionsOff)


class CountedRequest:
    """One request on its way through the gateway."""

    def __init__(self, counters: "RequestCounters") -> None:
        self.is_accepted = False
        self.final: Final | None = None
        self._counters = counters
        self._received_s = time.perf_counter()
        self._has_tokens = False

    def accepted(self) -> None:
        """A worker has queued it."""
        self.is_accepted = True
        self._counters.accepted += 1

    def generated(self, num_tokens: int) -> None:
        self._counters.generated_tokens += num_tokens
        if not self._has_tokens:
            self._has_tokens = True
            self._counters.first_token_seconds.observe(time.perf_counter() - self._received_s)

    def waited(self) -> None:
        """There was no worker to take it, or to go on with it."""
        self._counters.waited += 1

    def continued(self) -> None:
        """Another worker has queued the rest of it."""
        self._counters.continued += 1

    def recomputed(self, num_tokens: int) -> None:
        """That worker had to compute so many tokens of prompt and answer; the rest it found."""
        self._counters.recomputed_tokens += num_tokens

    def answered(self, final: Final) -> None:
        """The client has it all."""
        self.final = final


class RequestCounters:
    """Since the gateway started."""

    def __init__(self) -> None:
        self.received = 0
        self.accepted = 0
        self.ended: Counter[Outcome] = Counter()
        self.prompt_tokens: Counter[str] = Counter()  # source -> tokens, of finished requests
        self.generated_tokens = 0  # of all, also of those that did not finish
        self.waited = 0  # times that a request found no worker; it may find one later
        self.continued = 0  # times that a worker went on with what another one had queued
        self.recomputed_tokens = 0  # by those, of prompt and answer
        self.first_token_seconds = Histogram()

    @contextmanager
    def request(self) -> Iterator[CountedRequest]:
        """Around all of one request; the only place where an outcome is counted."""
        self.received += 1
        counted = CountedRequest(self)
        try:
            yield counted
        except BaseException as error:
            self.ended[_outcome(error, is_accepted=counted.is_accepted)] += 1
            raise
        self.ended[Outcome.FINISHED] += 1
        if counted.final is not None:
            self.prompt_tokens.update(_sources(counted.final))


def _outcome(error: BaseException, *, is_accepted: bool) -> Outcome:
    if isinstance(error, _CANCELLED):
        return Outcome.CANCELLED
    if isinstance(error, _REJECTED) and not is_accepted:
        return Outcome.REJECTED
    return Outcome.FAILED


def _sources(final: Final) -> dict[str, int]:
    """Where the KV of the prompt came from; the numbers add up to the prompt."""
    if (kv := final.kv) is None:
        return {"unknown": final.prompt_tokens}
    return {
        "device": kv.device_tokens,
        "ram": kv.ram_tokens,
        "disk": kv.disk_tokens,
        "peer": kv.peer_tokens,
        "cold": kv.cold_tokens,
        "computed": kv.computed_tokens,
    }
