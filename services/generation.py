"""One generate request as gateways and attention workers speak of it, and its wire form.

Everything the client left open is settled here: the prompt is token ids, the end tokens of the
model are among the stop tokens, the seed is drawn. Knows neither tokenizer nor engine.
"""

from dataclasses import dataclass
from enum import StrEnum

from protos import attention_pb2, inference_pb2


class FinishReason(StrEnum):
    """Why an answer is complete."""

    STOP = "stop"  # a stop token, which is the last token of the answer
    LENGTH = "length"  # max_tokens tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A valid request: whoever builds one has checked it against the model."""

    request_id: str
    token_ids: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.token_ids, f"request {self.request_id} has an empty prompt"
        assert self.max_tokens >= 1, f"request {self.request_id} asks for no token"

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
    )


def request_from_wire(message: attention_pb2.AttentionGenerateRequest) -> GenerationRequest:
    return GenerationRequest(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
    )


FINISH_REASON_TO_WIRE = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
FINISH_REASON_FROM_WIRE = {wire: reason for reason, wire in FINISH_REASON_TO_WIRE.items()}
