"""The one-way pipe from the engine to whoever consumes a request's tokens.

Both ends live on the engine's loop. Bounded by the request's own max_tokens: tokens that wait for a
slow consumer travel together.
"""

import asyncio
from typing import NamedTuple

from services.generation import FinishReason, KvUsage


class TokenEvent(NamedTuple):
    """Tokens since the last event, and in the last one of an answer why it ended."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    kv_usage: KvUsage  # of the prompt: the same in every event


class TokenStream:
    """Async iterator of `TokenEvent`; ends after the finish, or raises what ended the request.

    `kv_root` is the start of the request's chain of block keys.
    """

    def __init__(self, kv_root: bytes) -> None:
        self.kv_root = kv_root
        self._tokens: list[int] = []
        self._outcome: FinishReason | Exception | None = None
        self._kv_usage = KvUsage()
        self._is_consumed = False
        self._wake = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """The engine is done with the request, though events may still wait."""
        return self._outcome is not None

    def put(self, token_id: int, kv_usage: KvUsage) -> None:
        assert self._outcome is None
        self._tokens.append(token_id)
        self._kv_usage = kv_usage
        self._wake.set()

    def end(self, outcome: FinishReason | Exception) -> None:
        """Exactly once a stream."""
        assert self._outcome is None
        self._outcome = outcome
        self._wake.set()

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_consumed:
            raise StopAsyncIteration
        await self._wake.wait()
        self._wake.clear()
        if isinstance(self._outcome, Exception):
            self._is_consumed = True
            raise self._outcome
        tokens = tuple(self._tokens)
        self._tokens.clear()
        self._is_consumed = self._outcome is not None
        return TokenEvent(tokens, self._outcome, self._kv_usage)
