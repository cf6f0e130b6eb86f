"""Who is in the next step: continuous batching as plain Python over ints.

Decode first, then chunks of prompts in order of arrival, within `max_batch_tokens` and
`max_sequences`. A sequence is admitted when the pool can hold all it can ever become, so none is
ever thrown out midway. Strictly first come, first served: a large request is not overtaken, hence
not starved. Owns the waiting and the running sequences and their claims on the pool. No clock, no
tensor, no sleep.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from services.attention.sequence import Claim, Sequence, SequenceState
from services.errors import QueueFull
from services.generation import FinishReason

PoolClaim = TypeVar("PoolClaim")


class ClaimPool(Protocol[PoolClaim]):
    """What the scheduler needs of a KV pool. `allocate` reserves for a sequence's whole life."""

    def can_allocate(self, num_tokens: int) -> bool: ...
    def allocate(self, num_tokens: int) -> PoolClaim: ...
    def free(self, handle: PoolClaim) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of a step and of the queue."""

    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_batch_tokens:
            raise ValueError(
                f"max_sequences {self.max_sequences} must be between 1 and max_batch_tokens "
                f"{self.max_batch_tokens}: each running sequence decodes one token a step"
            )
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, not {self.max_waiting}")


class Slice(NamedTuple, Generic[Claim]):
    """The tokens [start, end) of a sequence that one step computes."""

    sequence: Sequence[Claim]
    start: int
    end: int

    @property
    def wants_token(self) -> bool:
        """The step reaches the end of what is known, so it yields the next token."""
        return self.end == len(self.sequence.token_ids)


class Scheduler(Generic[Claim]):
    """Owner of all live sequences of a worker."""

    def __init__(self, limits: SchedulerLimits, pool: ClaimPool[Claim]) -> None:
        self.limits = limits
        self._pool = pool
        self._waiting: deque[Sequence[Claim]] = deque()
        self._running: list[Sequence[Claim]] = []  # in order of admission

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence[Claim]) -> None:
        """Queue a sequence that fits an empty pool; raises QueueFull."""
        assert sequence.state is SequenceState.WAITING
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting, the queue holds no more")
        self._waiting.append(sequence)

    def schedule(self) -> list[Slice[Claim]]:
        """The next step, admissions included; empty only when no sequence is live."""
        budget = self.limits.max_batch_tokens
        decoding = [sequence for sequence in self._running if sequence.is_decoding]
        filling = [sequence for sequence in self._running if not sequence.is_decoding]
        slices = [_slice(sequence, budget) for sequence in decoding]
        budget -= len(slices)
        for sequence in filling:
            if budget == 0:
                break
            slices.append(_slice(sequence, budget))
            budget -= slices[-1].end - slices[-1].start
        while budget and self._waiting and self._can_admit(self._waiting[0]):
            slices.append(_slice(self._admit(), budget))
            budget -= slices[-1].end - slices[-1].start
        assert slices or not (self._waiting or self._running), "live sequences, but nothing to do"
        return slices

    def computed(self, done: Slice[Claim], token_id: int | None) -> FinishReason | None:
        """The step wrote the slice's KV and, if the slice wanted one, drew a token."""
        sequence, start, end = done
        assert sequence.state is SequenceState.RUNNING
        assert sequence.num_computed == start
        assert (token_id is not None) == done.wants_token
        sequence.num_computed = end
        if token_id is None:
            return None
        sequence.token_ids.append(token_id)
        if token_id in sequence.request.stop_token_ids:
            return FinishReason.STOP
        if sequence.num_answer_tokens == sequence.request.max_tokens:
            return FinishReason.LENGTH
        return None

    def end(self, sequence: Sequence[Claim]) -> None:
        """Forget the sequence and free its claim. Not while a step that holds it runs."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        else:
            assert sequence.state is SequenceState.RUNNING
            assert sequence.claim is not None
            self._running.remove(sequence)
            self._pool.free(sequence.claim)
            sequence.claim = None
        sequence.state = SequenceState.ENDED

    def check(self) -> None:
        """Assert what must hold between steps."""
        assert len(self._waiting) <= self.limits.max_waiting
        assert len(self._running) <= self.limits.max_sequences
        for sequence in self._waiting:
            assert sequence.state is SequenceState.WAITING
            assert sequence.claim is None
        for sequence in self._running:
            assert sequence.state is SequenceState.RUNNING
            assert sequence.claim is not None
            assert sequence.num_to_compute >= 1
            assert len(sequence.token_ids) < sequence.request.max_total_tokens
        live = [sequence.request.request_id for sequence in (*self._waiting, *self._running)]
        assert len(set(live)) == len(live)

    def _can_admit(self, sequence: Sequence[Claim]) -> bool:
        return len(self._running) < self.limits.max_sequences and self._pool.can_allocate(
            sequence.request.max_total_tokens
        )

    def _admit(self) -> Sequence[Claim]:
        sequence = self._waiting.popleft()
        sequence.claim = self._pool.allocate(sequence.request.max_total_tokens)
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)
        return sequence


def _slice(sequence: Sequence[Claim], budget: int) -> Slice[Claim]:
    start = sequence.num_computed
    return Slice(sequence, start, start + min(budget, sequence.num_to_compute))
