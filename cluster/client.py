"""The command line's own client of a running deployment: one channel to a gateway.

Turns frames into plain values and gRPC failures into errors with an exit code. Knows nothing of how
the deployment runs.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from cluster.access import Access
from protos import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from services import rpc
from services.generation import KvUsage, kv_usage_from_wire
from services.tokens import TokenChannel

CONNECT_TIMEOUT_SECONDS = 3.0
# Longer than a supervisor waits for a busy actor.
CONTROL_TIMEOUT_SECONDS = 15.0


class Unreachable(Exception):
    """Nobody answers at the endpoint."""


class RequestRefused(Exception):
    """The deployment says that the request itself is wrong."""


class RequestFailed(Exception):
    """The deployment accepted the request and could not complete it."""


class Interrupted(RequestFailed):
    """The deployment ended the call; what it was to do may be done or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One generate request as the user gave it. None: whatever the deployment does by default."""

    prompt: str | tuple[int, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    session_id: str = ""  # the prompt is its next turn
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens as they arrive; the text lags behind while a character is incomplete."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class End:
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    kv: KvUsage | None = None


class Client:
    def __init__(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self._inference = inference_pb2_grpc.InferenceStub(channel)
        self._control = control_pb2_grpc.ControlStub(channel)

    async def ask(self, question: Question) -> AsyncIterator[Piece | End]:
        """Pieces, then one End. Leaving the iteration cancels the request."""
        with named_failures(self.endpoint):
            async for response in self._inference.GenerateStream(_to_wire(question)):
                match response.WhichOneof("frame"):
                    case "delta":
                        yield Piece(tuple(response.delta.token_ids), response.delta.text)
                    case "final":
                        final = response.final
                        yield End(
                            inference_pb2.FinishReason.Name(final.finish_reason)
                            .removeprefix("FINISH_REASON_")
                            .lower(),
                            final.usage.prompt_tokens,
                            final.usage.completion_tokens,
                            kv_usage_from_wire(final.usage.kv)
                            if final.usage.HasField("kv")
                            else None,
                        )

    async def topology(self) -> control_pb2.GetTopologyResponse:
        with named_failures(self.endpoint):
            answer: control_pb2.GetTopologyResponse = await self._control.GetTopology(
                control_pb2.GetTopologyRequest(), timeout=CONTROL_TIMEOUT_SECONDS
            )
            return answer

    async def server_info(self) -> control_pb2.GetServerInfoResponse:
        with named_failures(self.endpoint):
            answer: control_pb2.GetServerInfoResponse = await self._control.GetServerInfo(
                control_pb2.GetServerInfoRequest(), timeout=CONTROL_TIMEOUT_SECONDS
            )
            return answer

    async def kv_stats(self) -> control_pb2.GetKvStatsResponse:
        with named_failures(self.endpoint):
            answer: control_pb2.GetKvStatsResponse = await self._control.GetKvStats(
                control_pb2.GetKvStatsRequest(), timeout=CONTROL_TIMEOUT_SECONDS
            )
            return answer

    async def model_info(self) -> control_pb2.GetModelInfoResponse:
        with named_failures(self.endpoint):
            answer: control_pb2.GetModelInfoResponse = await self._control.GetModelInfo(
                control_pb2.GetModelInfoRequest(), timeout=CONTROL_TIMEOUT_SECONDS
            )
            return answer


@asynccontextmanager
async def connected(access: Access) -> AsyncIterator[Client]:
    """Raises `Unreachable` if no server answers within a few seconds."""
    async with rpc.channel(access.endpoint, access.tls) as channel:
        if access.token is not None:
            channel = TokenChannel(channel, access.token)
        if not await _connects(channel):
            # With the wrong kind of connection, too, there is nobody.
            how = "" if access.tls is None else " over TLS, as the settings say"
            raise Unreachable(
                f"no gateway answers at {access.endpoint}{how}; start one with `model1 serve`, or "
                "name another with --endpoint HOST:PORT"
            )
        yield Client(channel, access.endpoint)


async def _connects(channel: grpc.aio.Channel) -> bool:
    """False at once where the connection is refused, rather than after gRPC's retries."""
    down = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            while (state := channel.get_state(try_to_connect=True)) not in down:
                if state is grpc.ChannelConnectivity.READY:
                    return True
                await channel.wait_for_state_change(state)
    except TimeoutError:
        pass
    return False


def _to_wire(question: Question) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        sampling=inference_pb2.SamplingParams(
            temperature=question.temperature, top_p=question.top_p, seed=question.seed
        ),
        stopping=inference_pb2.StoppingParams(max_tokens=question.max_tokens),
        session_id=question.session_id,
        cache_salt=question.cache_salt,
    )
    if isinstance(question.prompt, str):
        request.text = question.prompt
    else:
        request.token_ids.ids.extend(question.prompt)
    return request


@contextmanager
def named_failures(endpoint: str) -> Iterator[None]:
    """What a call to a deployment failed by, as one of our errors."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        words = error.details() or error.code().name
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            raise RequestRefused(words) from None
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise Unreachable(f"{endpoint}: {words}") from None
        if error.code() is grpc.StatusCode.CANCELLED:
            raise Interrupted(f"CANCELLED: {words}") from None
        raise RequestFailed(f"{error.code().name}: {words}") from None
