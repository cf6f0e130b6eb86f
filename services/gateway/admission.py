"""What a client asked for, checked against the model and completed, or refused by name.

Owns the defaults (max_tokens, a drawn seed, a made-up request id). Knows neither gRPC nor workers;
`model1 generate --local` admits through it as well.
"""

import secrets
import uuid
from dataclasses import dataclass, replace

from model1.errors import InvalidRequest
from model1.tokenizer import Tokenizer
from services.generation import GenerationRequest, check_token_ids

# No special token has a longer text; <｜begin▁of▁sentence｜> has 29 bytes.
LONGEST_SPECIAL_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSampling:
    """How tokens are drawn, as the client said it; None is left open."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedStopping:
    """When the answer ends, as the client said it; None is left open."""

    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRequest:
    """A request as it came: nothing is checked yet. `prompt` is text, token ids or missing."""

    prompt: str | tuple[int, ...] | None
    request_id: str = ""
    session_id: str = ""  # empty: not a turn of a session
    cache_salt: str = ""
    sampling: AskedSampling = AskedSampling()
    stopping: AskedStopping = AskedStopping()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What of the model and the deployment bounds a request."""

    vocab_size: int
    max_context_length: int  # prompt and answer together
    default_max_tokens: int
    eos_token_ids: tuple[int, ...]


class Admission:
    """Turns what was asked into a valid GenerationRequest."""

    def __init__(self, tokenizer: Tokenizer, limits: ModelLimits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self._made_for_tokens = limits.max_context_length
        longest = max(len(tokenizer.token_bytes(token)) for token in range(limits.vocab_size))
        self._longest_token_bytes = max(longest, LONGEST_SPECIAL_BYTES)

    def limit_context(self, max_tokens: int) -> None:
        """Of what comes from now on, however much the model was made for."""
        self.limits = replace(
            self.limits, max_context_length=min(self._made_for_tokens, max_tokens)
        )

    def admit(self, asked: AskedRequest, history: tuple[int, ...] = ()) -> GenerationRequest:
        """`history` is what the session said before. Raises InvalidRequest with a message that
        names the value and its bound."""
        limits = self.limits
        new_ids = self._encoded(asked.prompt, goes_on=bool(history))
        token_ids = history + new_ids
        prompt = f"the prompt has {len(new_ids)} tokens"
        if history:
            prompt += f" after {len(history)} of the session"
        room = limits.max_context_length - len(token_ids)
        if room < 0:
            raise InvalidRequest(f"{prompt}, the context is {limits.max_context_length} tokens")
        if room == 0:
            raise InvalidRequest(
                f"{prompt} and fills the context of {limits.max_context_length} tokens: there is "
                "no room for an answer"
            )
        check_token_ids(new_ids, limits.vocab_size, "the prompt")
        max_tokens = asked.stopping.max_tokens
        if max_tokens is None:
            max_tokens = min(limits.default_max_tokens, room)
        if max_tokens > room:
            raise InvalidRequest(
                f"max_tokens {max_tokens} and a prompt of {len(token_ids)} tokens exceed the "
                f"context of {limits.max_context_length} tokens"
            )
        check_token_ids(asked.stopping.stop_token_ids, limits.vocab_size, "stop_token_ids")
        eos_token_ids = () if asked.stopping.ignore_eos else limits.eos_token_ids
        sampling = asked.sampling
        return GenerationRequest(
            request_id=asked.request_id or uuid.uuid4().hex,
            token_ids=token_ids,
            max_tokens=max_tokens,
            stop_token_ids=frozenset((*asked.stopping.stop_token_ids, *eos_token_ids)),
            temperature=sampling.temperature,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            top_k=sampling.top_k,
            # Drawn here, not by the worker: whichever worker goes on draws the same tokens.
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            session_id=asked.session_id,
            cache_salt=asked.cache_salt,
        )

    def _encoded(self, prompt: str | tuple[int, ...] | None, *, goes_on: bool) -> tuple[int, ...]:
        if prompt is None:
            raise InvalidRequest("the request has no prompt: set text or token_ids")
        if not prompt:
            raise InvalidRequest("the prompt is empty")
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) > self.limits.max_context_length * self._longest_token_bytes:
            # Encoding megabytes would hold up every other request before it is refused.
            raise InvalidRequest(
                f"the prompt has {len(prompt)} characters, more than a context of "
                f"{self.limits.max_context_length} tokens can hold"
            )
        return tuple(self.tokenizer.encode(prompt, goes_on=goes_on))
