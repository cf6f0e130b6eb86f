"""POST /v1/completions as messages: OpenAI's request into ours, our frames into OpenAI's answer.

Of OpenAI's fields those that we cannot do are taken with the value that asks for nothing, and
refused by name with any other, as are fields that nobody knows: a client learns that it would not
get what it asked for. Our own fields are `session_id`, `cache_salt`, `top_k`, `stop_token_ids`,
`ignore_eos` and `return_token_ids`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from protos import inference_pb2
from services.http.errors import InvalidBody
from services.http.stop_texts import StopTexts

MAX_STOP_TEXTS = 4
TOKEN_ID_LIMIT = 2**32

# OpenAI's fields that we do not have, and the values that ask for nothing. `user` says who asks.
_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}

TokenId = StrictInt


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body. Unset `max_tokens` is the server's default; unset `temperature` is 1, as OpenAI has
    it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1, lt=2**32)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**32)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    session_id: str = ""
    cache_salt: str = ""
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _a_few_texts(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > MAX_STOP_TEXTS or not all(texts):
            raise ValueError(f"at most {MAX_STOP_TEXTS} texts, none of them empty")
        return value

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def to_wire(self, request_id: str) -> inference_pb2.GenerateRequest:
        """Raises `InvalidBody`."""
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            session_id=self.session_id,
            cache_salt=self.cache_salt,
            sampling=inference_pb2.SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=self.seed,
            ),
            stopping=inference_pb2.StoppingParams(
                max_tokens=self.max_tokens,
                stop_token_ids=_token_ids(self.stop_token_ids, "stop_token_ids"),
                ignore_eos=self.ignore_eos,
            ),
        )
        prompt = self._one_prompt()
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(_token_ids(prompt, "prompt"))
        return request

    def _one_prompt(self) -> str | list[int]:
        match self.prompt:
            case str() as text:
                return text
            case [] | [[]]:
                raise InvalidBody("the prompt is empty", "prompt")
            case [str() | list() as only]:
                return only
            case [int(), *_] as token_ids:
                return [each for each in token_ids if isinstance(each, int)]
        raise InvalidBody(f"one prompt a request, not {len(self.prompt)}", "prompt")


def parsed(body: object) -> CompletionRequest:
    """Raises `InvalidBody` that names the field."""
    if not isinstance(body, dict):
        raise InvalidBody("the body is not a JSON object")
    fields = dict(body)
    for key, nothing in _WITHOUT_EFFECT.items():
        value = fields.pop(key, None)
        if not any(value == each for each in nothing):
            allowed = " or ".join(repr(each) for each in nothing)
            raise InvalidBody(f"{key} is not supported: leave it out, or {allowed}", key)
    try:
        return CompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise InvalidBody(f"unknown field {name!r}", name) from None
        raise InvalidBody(f"{name}: {first['msg']}", name) from None


@dataclass(slots=True)
class Completion:
    """One answer as it arrives. `chunk` is what a stream is told of a frame, `whole` all of it."""

    asked: CompletionRequest
    completion_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    _stops: StopTexts = field(init=False)

    def __post_init__(self) -> None:
        self._stops = StopTexts(self.asked.stop_texts)

    def chunk(self, frame: inference_pb2.GenerateStreamResponse) -> dict[str, Any] | None:
        """None: there is nothing to tell yet. After it `finish_reason` may be set, and then nothing
        more is to come."""
        text, token_ids = "", []
        match frame.WhichOneof("frame"):
            case "delta":
                token_ids = list(frame.delta.token_ids)
                text = self._stops.passed(frame.delta.text)
                if self._stops.was_met:
                    self.finish_reason = "stop"
            case "final":
                text = self._stops.rest()
                self.finish_reason = _FINISH_REASONS.get(frame.final.finish_reason, "stop")
                self.num_prompt_tokens = frame.final.usage.prompt_tokens
        self.text += text
        self.token_ids += token_ids
        if (
            not text
            and self.finish_reason is None
            and not (token_ids and self.asked.return_token_ids)
        ):
            return None
        return self._as_json([self._choice(text, token_ids)])

    def whole(self) -> dict[str, Any]:
        return self._as_json([self._choice(self.text, self.token_ids)]) | {"usage": self._usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The last one of a stream that was asked for with `include_usage`."""
        return self._as_json([]) | {"usage": self._usage()}

    def _choice(self, text: str, token_ids: list[int]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": self.finish_reason,
        }
        return choice | ({"token_ids": token_ids} if self.asked.return_token_ids else {})

    def _as_json(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int | None]:
        """A stop text ends the request before anybody has counted its prompt."""
        completion = len(self.token_ids)
        prompt = self.num_prompt_tokens
        total = None if prompt is None else prompt + completion
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": total,
        }


def _token_ids(ids: list[int], name: str) -> list[int]:
    if wrong := [each for each in ids if not 0 <= each < TOKEN_ID_LIMIT]:
        raise InvalidBody(f"{name}: {wrong[0]} is not a token id", name)
    return ids
