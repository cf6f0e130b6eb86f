"""One request's tokens and how far they are computed.

A sequence is changed by the scheduler and by nobody else. Knows no tensor: the claim on the KV
pool is an opaque handle that the scheduler took and gives back.
"""

from enum import Enum, auto
from typing import Generic, TypeVar

from services.generation import GenerationRequest

Claim = TypeVar("Claim")


class SequenceState(Enum):
    """Where a sequence is; it only moves downwards."""

    WAITING = auto()  # holds no claim
    RUNNING = auto()  # holds a claim
    ENDED = auto()  # holds no claim any more


class Sequence(Generic[Claim]):
    """Token ranges, half-open::

    0            num_computed         num_tokens
    |-- in the KV pool --|-- to compute --|
    |---- prompt ----|------ answer ------|
    0            num_prompt           num_tokens
    """

    __slots__ = ("claim", "num_computed", "request", "state", "token_ids")

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.token_ids: list[int] = list(request.token_ids)
        self.num_computed = 0
        self.state = SequenceState.WAITING
        self.claim: Claim | None = None

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
    def is_decoding(self) -> bool:
        return self.num_computed >= self.num_prompt_tokens
