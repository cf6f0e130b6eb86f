"""Who is in the next step: continuous batching as plain Python over ints.

Decode first, then chunks of prompts in order of arrival, within `max_batch_tokens` and
`max_sequences`. A sequence is admitted when the KV cache can hold all it can ever become, so none
is ever thrown out midway. First come, first served: a large request is not overtaken for lack of
room, hence not starved; only while it is being found out what of its prompt need not be computed
do others go ahead. A sequence whose KV is still being loaded holds its place and skips steps. Owns
the waiting and the running sequences and when their claims are taken and given back. No clock, no
tensor, no sleep.
"""

from collections import deque
from dataclasses import dataclass
from typing import Generic, NamedTuple

from services.attention.sequence import Claim, Sequence, SequenceState
from services.errors import QueueFull
from services.generation import FinishReason


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

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_prompt_tokens(self) -> int:
        return max(0, min(self.end, self.sequence.num_prompt_tokens) - self.start)


class Scheduler(Generic[Claim]):
    """Owner of all live sequences of a worker."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self._waiting: deque[Sequence[Claim]] = deque()
        self._running: list[Sequence[Claim]] = []  # in order of admission

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def require_room(self) -> None:
        """Raises QueueFull when no sequence can be added."""
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting, the queue holds no more")

    def add(self, sequence: Sequence[Claim]) -> None:
        """Queue a sequence that fits an empty pool; raises QueueFull."""
        assert sequence.state is SequenceState.WAITING
        self.require_room()
        self._waiting.append(sequence)

    def schedule(self) -> list[Slice[Claim]]:
        """The next step, admissions included.

        Empty when no sequence is live, or every live one waits for the KV cache: for what is being
        loaded or looked up, or for room that is not a running sequence's to give back.
        """
        self._admit()
        budget = self.limits.max_batch_tokens
        able = [sequence for sequence in self._running if not sequence.claim.is_loading]
        decoding = [sequence for sequence in able if sequence.is_decoding]
        filling = [sequence for sequence in able if not sequence.is_decoding]
        slices = [_slice(sequence, budget) for sequence in decoding]
        budget -= len(slices)
        for sequence in filling:
            if budget == 0:
                break
            slices.append(_slice(sequence, budget))
            budget -= slices[-1].num_tokens
        return slices

    def computed(self, done: Slice[Claim], token_id: int | None) -> FinishReason | None:
        """The step wrote the slice's KV and, if the slice wanted one, drew a token."""
        sequence = done.sequence
        assert sequence.state is SequenceState.RUNNING
        assert sequence.num_computed == done.end
        assert (token_id is not None) == done.wants_token
        sequence.claim.computed(sequence.token_ids)
        if token_id is None:
            return None
        sequence.token_ids.append(token_id)
        if token_id in sequence.request.stop_token_ids:
            return FinishReason.STOP
        if sequence.num_answer_tokens == sequence.request.max_tokens:
            return FinishReason.LENGTH
        return None

    def end(self, sequence: Sequence[Claim]) -> None:
        """Forget the sequence and give its claim back. Not while a step that holds it runs."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        else:
            assert sequence.state is SequenceState.RUNNING
            self._running.remove(sequence)
        sequence.state = SequenceState.ENDED
        sequence.claim.give_back()

    def check(self) -> None:
        """Assert what must hold between steps."""
        assert len(self._waiting) <= self.limits.max_waiting
        assert len(self._running) <= self.limits.max_sequences
        for sequence in self._waiting:
            assert sequence.state is SequenceState.WAITING
        for sequence in self._running:
            assert sequence.state is SequenceState.RUNNING
            assert sequence.num_to_compute >= 1
            assert len(sequence.token_ids) < sequence.request.max_total_tokens
        live = [sequence.request.request_id for sequence in (*self._waiting, *self._running)]
        assert len(set(live)) == len(live)

    def _admit(self) -> None:
        """Take in whom there is room for, in order of arrival."""
        for sequence in tuple(self._waiting):
            if len(self._running) == self.limits.max_sequences:
                break
            if not sequence.claim.is_ready:
                continue
            if not sequence.claim.has_room:
                break
            sequence.claim.take()
            sequence.state = SequenceState.RUNNING
            self._waiting.remove(sequence)
            self._running.append(sequence)


def _slice(sequence: Sequence[Claim], budget: int) -> Slice[Claim]:
    start = sequence.num_computed
    end = min(start + budget, len(sequence.token_ids), sequence.claim.next_stop)
    assert start < end
    return Slice(sequence, start, end)
