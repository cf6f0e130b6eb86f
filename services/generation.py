"""One generate request as gateways and attention workers speak of it, and its wire form.

Everything the client left open is settled here: the prompt is token ids, the end tokens of the
model are among the stop tokens, the seed is drawn. Knows neither tokenizer nor engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from model1.errors import InvalidRequest
from protos import attention_pb2, inference_pb2

MAX_REQUEST_ID_LENGTH = 128
MAX_SESSION_ID_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 256


class FinishReason(StrEnum):
    """Why an answer is complete."""

    STOP = "stop"  # a stop token, which is the last token of the answer
    LENGTH = "length"  # max_tokens tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUsage:
    """Where the KV state of a prompt's tokens came from; a token counts once."""

    device_tokens: int = 0
    ram_tokens: int = 0
    disk_tokens: int = 0
    peer_tokens: int = 0
    cold_tokens: int = 0
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request whose values make sense; whether they fit a model is for its holder to check.

    Raises InvalidRequest naming the value that does not.
    """

    request_id: str
    token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    cache_salt: str = ""  # KV is shared among requests with the same salt
    session_id: str = ""  # for the log: the history is in token_ids

    def __post_init__(self) -> None:
        if not self.request_id or len(self.request_id) > MAX_REQUEST_ID_LENGTH:
            raise InvalidRequest(
                f"request_id must have 1 to {MAX_REQUEST_ID_LENGTH} characters, "
                f"not {len(self.request_id)}"
            )
        for name, value, max_length in (
            ("session_id", self.session_id, MAX_SESSION_ID_LENGTH),
            ("cache_salt", self.cache_salt, MAX_CACHE_SALT_LENGTH),
        ):
            if len(value) > max_length:
                raise InvalidRequest(
                    f"{name} must have at most {max_length} characters, not {len(value)}"
                )
        for name, value in (("request_id", self.request_id), ("session_id", self.session_id)):
            if not value.isprintable():  # it stands in log lines
                raise InvalidRequest(f"{name} {value!r} has unprintable characters")
        if not self.token_ids:
            raise InvalidRequest("the prompt is empty")
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature <= 100:
            raise InvalidRequest(f"temperature must be between 0 and 100, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k must be 0 (off) or more, not {self.top_k}")

    @property
    def max_total_tokens(self) -> int:
        """Prompt and answer together can never be longer."""
        return len(self.token_ids) + self.max_tokens


def request_to_wire(request: GenerationRequest) -> attention_pb2.AttentionGenerateRequest:
    return attention_pb2.AttentionGenerateRequest(
        request_id=request.request_id,
        token_ids=request.token_ids,
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        cache_salt=request.cache_salt,
        session_id=request.session_id,
    )


def request_from_wire(message: attention_pb2.AttentionGenerateRequest) -> GenerationRequest:
    """Raises InvalidRequest, like the constructor."""
    return GenerationRequest(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        cache_salt=message.cache_salt,
        session_id=message.session_id,
    )


def kv_usage_to_wire(usage: KvUsage) -> inference_pb2.KvUsage:
    return inference_pb2.KvUsage(
        device_tokens=usage.device_tokens,
        ram_tokens=usage.ram_tokens,
        disk_tokens=usage.disk_tokens,
        peer_tokens=usage.peer_tokens,
        cold_tokens=usage.cold_tokens,
        computed_tokens=usage.computed_tokens,
    )


def kv_usage_from_wire(message: inference_pb2.KvUsage) -> KvUsage:
    return KvUsage(
        device_tokens=message.device_tokens,
        ram_tokens=message.ram_tokens,
        disk_tokens=message.disk_tokens,
        peer_tokens=message.peer_tokens,
        cold_tokens=message.cold_tokens,
        computed_tokens=message.computed_tokens,
    )


def check_token_ids(token_ids: Iterable[int], vocab_size: int, what: str) -> None:
    """Raises InvalidRequest naming the first id that is not one."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"token id {token_id} in {what} is outside the vocabulary of {vocab_size} tokens"
            )


FINISH_REASON_TO_WIRE = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
FINISH_REASON_FROM_WIRE = {wire: reason for reason, wire in FINISH_REASON_TO_WIRE.items()}
