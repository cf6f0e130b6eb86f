"""What a client gets back: frames, and the text that goes with the tokens.

Knows neither gRPC nor workers.
"""

from dataclasses import dataclass
from typing import TypeAlias

from model1.tokenizer import Tokenizer
from services.generation import FinishReason, GenerationRequest


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request waits in the queue of `worker`."""

    request_id: str
    worker: str


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the answer; numbered 0, 1, 2, ... within a request."""

    sequence_number: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Final:
    """The answer is complete."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


Frame: TypeAlias = Accepted | Delta | Final


class Answer:
    """Numbers the pieces of one answer and turns their tokens into text."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._decoder = tokenizer.stream()
        self._next_number = 0
        self._num_tokens = 0

    def delta(self, token_ids: tuple[int, ...]) -> Delta:
        """The frame for new tokens. A stop token is a token of the answer, but not text."""
        self._num_tokens += len(token_ids)
        stop = self._request.stop_token_ids
        text = "".join(self._decoder.push(token) for token in token_ids if token not in stop)
        return self._numbered(token_ids, text)

    def rest(self) -> Delta | None:
        """Text that was held back as half a character when the tokens ended."""
        text = self._decoder.flush()
        return self._numbered((), text) if text else None

    def final(self, finish_reason: FinishReason) -> Final:
        return Final(finish_reason, len(self._request.token_ids), self._num_tokens)

    def _numbered(self, token_ids: tuple[int, ...], text: str) -> Delta:
        self._next_number += 1
        return Delta(self._next_number - 1, token_ids, text)
