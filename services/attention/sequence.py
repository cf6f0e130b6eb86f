"""One request's tokens and how far they are computed.

A sequence is changed by the scheduler and by nobody else. Knows no tensor: what it holds of the KV
cache is an opaque claim with its own life.
"""

from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

from services.generation import GenerationRequest


class KVClaim(Protocol):
    """What one request may hold of a KV cache, from its arrival on. The scheduler takes it, tells
    it how far the sequence is computed, and gives it back exactly once, taken or not."""

    @property
    def is_ready(self) -> bool:
        """False while it is still being found out what of the prompt need not be computed."""

    @property
    def has_room(self) -> bool:
        """Would `take` succeed now?"""

    def take(self) -> None:
        """Reserve all that the sequence can ever need."""

    @property
    def is_loading(self) -> bool:
        """Taken, but what need not be computed is still on its way."""

    @property
    def num_tokens(self) -> int:
        """[0, num_tokens) is in the cache. Grows by steps and, between them, by loading."""

    @property
    def next_stop(self) -> int:
        """A step must not go beyond: the sequence's state is needed as it is at this position."""

    def computed(self, token_ids: list[int]) -> None:
        """A step succeeded; `token_ids` is the sequence so far, `num_tokens` of it computed."""

    def give_back(self) -> None:
        """Not while a step that holds it runs."""


Claim = TypeVar("Claim", bound=KVClaim)


class SequenceState(Enum):
    """Where a sequence is; it only moves downwards."""

    WAITING = auto()  # its claim is not taken
    RUNNING = auto()  # its claim is taken
    ENDED = auto()  # its claim is given back


class Sequence(Generic[Claim]):
    """Token ranges, half-open::

    0            num_computed         num_tokens
    |--- in the KV cache ---|--- to compute ---|
    |------ prompt ------|------- answer ------|
    0                num_prompt       num_tokens
    """

    __slots__ = ("claim", "request", "state", "token_ids")

    def __init__(self, request: GenerationRequest, claim: Claim) -> None:
        self.request = request
        self.token_ids: list[int] = list(request.token_ids)
        self.state = SequenceState.WAITING
        self.claim = claim

    @property
    def num_computed(self) -> int:
        return self.claim.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_waiting(self) -> bool:
        return self.state is SequenceState.WAITING

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= self.num_prompt_tokens
