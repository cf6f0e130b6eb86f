"""What a client gets back: frames, and the text that goes with the tokens.

Knows neither gRPC nor workers.
"""

from dataclasses import dataclass
from typing import TypeAlias

from model1.tokenizer import Tokenizer
from services.generation import FinishReason, GenerationRequest, KvUsage


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
    kv: KvUsage | None = None


Frame: TypeAlias = Accepted | Delta | Final


class Answer:
    """Numbers the pieces of one answer and turns their tokens into text."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._decoder = tokenizer.stream()
        self._next_number = 0
        self._token_ids: list[int] = []

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the whole answer so far."""
        return tuple(self._token_ids)

    def delta(self, token_ids: tuple[int, ...]) -> Delta:
        """The frame for new tokens. A stop token is a token of the answer, but not text."""
        self._token_ids += token_ids
        stop = self._request.stop_token_ids
        text = "".join(self._decoder.push(token) for token in token_ids if token not in stop)
        return self._numbered(token_ids, text)

    def rest(self) -> Delta | None:
        """Text that was held back as half a character when the tokens ended."""
        text = self._decoder.flush()
        return self._numbered((), text) if text else None

    def final(self, finish_reason: FinishReason, kv: KvUsage | None = None) -> Final:
        num_prompt_tokens = len(self._request.token_ids)
        return Final(finish_reason, num_prompt_tokens, len(self._token_ids), kv)

    def _numbered(self, token_ids: tuple[int, ...], text: str) -> Delta:
        self._next_number += 1
        return Delta(self._next_number - 1, token_ids, text)
