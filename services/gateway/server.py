"""The gRPC edge of a gateway's requests, and its life from listening to closed."""

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from model1.checkpoint import load_config
from model1.config import ModelConfig
from model1.tokenizer import Tokenizer
from protos import control_pb2, inference_pb2, inference_pb2_grpc
from services import rpc
from services.errors import ending_with_status
from services.gateway import wire
from services.gateway.admission import Admission, ModelLimits
from services.gateway.answer import Frame
from services.gateway.control_service import About, ControlService, control_service
from services.gateway.counters import Outcome
from services.gateway.gateway import Gateway
from services.gateway.operations import Operations
from services.gateway.session_admin import SessionAdmin
from services.gateway.session_service import SessionsService, sessions_service
from services.gateway.sessions import Sessions
from services.gateway.store import StoreAddress
from services.gateway.stores import StoreSet
from services.gateway.topology import TopologySource
from services.gateway.watched_worker import SilenceLimits
from services.gateway.worker import WorkerAddress
from services.gateway.workers import WorkerPool
from services.tls import Tls
from services.tokens import RequireToken, TokenFile

if TYPE_CHECKING:
    from services.gateway.metrics_server import MetricsServer

# After the gateway has ended every request, its handlers only have a last message to hand over.
HANDLERS_GRACE_S = 1.0
# A gateway that has drained goes on refusing until nobody has asked for the one time, at most for
# the other: a client needs a moment to see that its health is NOT_SERVING, and gRPC's server
# answers CANCELLED, not UNAVAILABLE, to calls that it has not handed over when it closes. All that
# comes after the grace time has to fit into the supervisor's margin (cluster/roster.py).
QUIET_S = 0.5
LINGER_S = 2.0

StreamContext: TypeAlias = grpc.aio.ServicerContext[
    inference_pb2.GenerateRequest, inference_pb2.GenerateStreamResponse
]
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What a gateway serves, where, and how much at once."""

    model_dir: Path
    version: str
    address: str = "127.0.0.1:50051"
    default_max_tokens: int = 256
    max_active_requests: int = 256
    # That a request waits for an attention worker to take it, or to go on where one was lost.
    continue_patience_seconds: float = 30.0
    silence: SilenceLimits = field(default_factory=SilenceLimits)
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None  # None: no metrics; 0: any free port
    tls: Tls | None = None  # to workers and stores, and for clients
    require_client_certificate: bool = False
    tokens: TokenFile | None = None  # None: clients need none


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """model1.v1.Inference."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse()

        async def emit(frame: Frame) -> None:
            wire.add_to_response(response, frame)

        async with ending_with_status(context, request.request_id):
            asked = wire.request_from_wire(request)
            await self._gateway.generate(asked, context.time_remaining(), emit)
        return response

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: StreamContext
    ) -> None:
        async def emit(frame: Frame) -> None:
            await context.write(wire.frame_to_wire(frame))

        async with ending_with_status(context, request.request_id):
            asked = wire.request_from_wire(request)
            await self._gateway.generate(asked, context.time_remaining(), emit)


class GatewayServer:
    """A listening gateway: owner of its live requests, its worker channels and the servers."""

    def __init__(
        self, gateway: Gateway, server: rpc.RunningServer, metrics: "MetricsServer | None"
    ) -> None:
        self.gateway = gateway
        self.address = server.address
        self._server = server
        self._metrics = metrics

    @classmethod
    async def open(
        cls, config: GatewayConfig, topology: TopologySource, operations: Operations
    ) -> "GatewayServer":
        """Listen and serve; give it workers with `update`."""
        model = load_config(config.model_dir)
        admission = Admission(Tokenizer.from_dir(config.model_dir), model_limits(model, config))
        gateway = Gateway(
            admission,
            WorkerPool(config.silence, config.tls),
            Sessions(StoreSet(config.tls)),
            max_active_requests=config.max_active_requests,
            continue_patience_s=config.continue_patience_seconds,
        )
        async with AsyncExitStack() as opened:
            metrics = await _open_metrics(gateway, config, topology)
            if metrics is not None:
                opened.push_async_callback(metrics.stop)
            inference = InferenceService(gateway)
            metrics_url = metrics.url if metrics is not None else ""
            about = About(str(config.model_dir), model, config.version, metrics_url)
            care = SessionAdmin(gateway.sessions, gateway.workers, admission)
            server = await rpc.start_server(
                [
                    rpc.Service(
                        "model1.v1.Inference",
                        partial(inference_pb2_grpc.add_InferenceServicer_to_server, inference),
                    ),
                    sessions_service(SessionsService(care, admission.tokenizer)),
                    control_service(ControlService(gateway, about, topology, operations)),
                ],
                config.address,
                max_receive_bytes=rpc.MAX_PUBLIC_MESSAGE_BYTES,
                tls=config.tls,
                require_client_certificate=config.require_client_certificate,
                interceptors=() if config.tokens is None else (RequireToken(config.tokens),),
            )
            opened.pop_all()
        return cls(gateway, server, metrics)

    async def update(
        self,
        workers: Sequence[WorkerAddress],
        stores: Sequence[StoreAddress],
        *,
        lost_workers: Collection[str] = (),
        max_context_length: int | None,
    ) -> None:
        """Use exactly these from now on. Requests at one of the `lost_workers` (addresses) go on
        elsewhere, whether or not it can be seen that it is gone. `max_context_length` is what each
        of the workers can hold; None leaves it as it is."""
        if max_context_length is not None:
            self.gateway.admission.limit_context(max_context_length)
        await self.gateway.workers.update(workers, lost_workers)
        await self.gateway.sessions.stores.update(stores)

    def stats(self) -> control_pb2.GatewayStats:
        """What it says of itself."""
        gateway, counters = self.gateway, self.gateway.counters
        return control_pb2.GatewayStats(
            received_requests=counters.received,
            finished_requests=counters.ended[Outcome.FINISHED],
            cancelled_requests=counters.ended[Outcome.CANCELLED],
            rejected_requests=counters.ended[Outcome.REJECTED],
            failed_requests=counters.ended[Outcome.FAILED],
            active_requests=gateway.num_active,
            max_active_requests=gateway.max_active_requests,
            generated_tokens=counters.generated_tokens,
            waits=counters.waited,
            continuations=counters.continued,
            recomputed_tokens=counters.recomputed_tokens,
            first_token_seconds=counters.first_token_seconds.to_wire(),
        )

    async def stop(self, grace_s: float) -> None:
        """Stop admitting, finish until `grace_s`, abort the rest, close within 4 s."""
        await self._server.set_serving(False)
        await self.gateway.drain(grace_s)
        if grace_s > 0:
            await self._until_nobody_asks()
        await self._server.stop(HANDLERS_GRACE_S)
        if self._metrics is not None:  # as late as that: a drain is worth watching
            await self._metrics.stop()
        await self.gateway.workers.close()
        await self.gateway.sessions.stores.close()

    async def _until_nobody_asks(self) -> None:
        counters, received = self.gateway.counters, -1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while received != counters.received:
                    received = counters.received
                    await asyncio.sleep(QUIET_S)


async def _open_metrics(
    gateway: Gateway, config: GatewayConfig, topology: TopologySource
) -> "MetricsServer | None":
    if config.metrics_port is None:
        return None
    # Here, so that a gateway without them need not import an HTTP server.
    from services.gateway.metrics import ask_all
    from services.gateway.metrics_server import MetricsServer

    ask = partial(ask_all, gateway, config.version, topology)
    return await MetricsServer.open(config.metrics_host, config.metrics_port, ask)


def model_limits(model: ModelConfig, config: GatewayConfig) -> ModelLimits:
    return ModelLimits(
        vocab_size=model.vocab_size,
        max_context_length=model.max_position_embeddings,
        default_max_tokens=config.default_max_tokens,
        eos_token_ids=model.eos_token_ids,
    )
