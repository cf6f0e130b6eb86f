"""OpenAI's HTTP interface in front of the gateways' gRPC: completions, models, health.

    POST /v1/completions   one answer as JSON, or with "stream": true as server-sent events
    GET  /v1/models        the one model
    GET  /healthz          200 while a gateway serves, 503 otherwise

Holds no state of a request but the call to a gateway that it is: a client that leaves cancels it.
`authorization` is passed on, so that who may ask is for the gateway to say.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from protos import inference_pb2, inference_pb2_grpc
from services.http.completion import Completion, parsed
from services.http.errors import HttpError, InvalidBody, UnknownModel, from_rpc_error
from services.http.gateways import Gateways
from services.rpc import MAX_PUBLIC_MESSAGE_BYTES

HEALTH_TIMEOUT_SECONDS = 2.0
# Before the first frame a request can begin anew elsewhere.
RETRIED = (grpc.StatusCode.UNAVAILABLE,)
CLIENT_LEFT = 499

Frame = inference_pb2.GenerateStreamResponse
Answer = TypeVar("Answer")


def http_app(gateways: Gateways, model: str) -> Starlette:
    """Closes the gateways when its lifespan ends."""
    completions = _Completions(gateways, model)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await gateways.close()

    async def models(_request: Request) -> Response:
        entry = {"id": model, "object": "model", "created": 0, "owned_by": "model1"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def healthz(_request: Request) -> Response:
        is_serving = await _any_serves(gateways)
        return JSONResponse({"serving": is_serving}, 200 if is_serving else 503)

    async def told(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HttpError)
        return error.response()

    async def not_there(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        words = f"{request.method} {request.url.path} is not served here"
        return HttpError(status, "invalid_request_error", words).response()

    return Starlette(
        routes=[
            Route("/v1/completions", completions.answer, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
        ],
        exception_handlers={HttpError: told, 404: not_there, 405: not_there},
        lifespan=lifespan,
    )


class _Completions:
    def __init__(self, gateways: Gateways, model: str) -> None:
        self._gateways = gateways
        self._model = model

    async def answer(self, request: Request) -> Response:
        asked = parsed(await _body(request))
        if asked.model not in (None, self._model):
            raise UnknownModel(str(asked.model), self._model)
        completion = Completion(asked, f"cmpl-{secrets.token_hex(12)}", self._model)
        frames = self._frames(asked.to_wire(completion.completion_id), request)
        if not asked.stream:
            return await _unless_gone(request, _whole(completion, frames))
        # Whatever goes wrong up to the first frame is told by the status.
        try:
            first = await _unless_gone(request, anext(frames))
        except BaseException:
            await frames.aclose()
            raise
        return StreamingResponse(_events(completion, first, frames), media_type="text/event-stream")

    async def _frames(
        self, message: inference_pb2.GenerateRequest, request: Request
    ) -> AsyncGenerator[Frame, None]:
        """Of one gateway; of another if that takes no request. Leaving it cancels the call."""
        shown = request.headers.get("authorization")
        metadata = (("authorization", shown),) if shown else ()
        error: HttpError = HttpError(503, "server_error", "no gateway is ready")
        for channel in await self._gateways.in_turn():
            stub = inference_pb2_grpc.InferenceStub(channel)
            call = stub.GenerateStream(message, metadata=metadata)
            has_begun = False
            try:
                async for frame in call:
                    has_begun = True
                    yield frame
                return
            except grpc.aio.AioRpcError as failed:
                error = from_rpc_error(failed)
                if has_begun or failed.code() not in RETRIED:
                    raise error from None
                self._gateways.doubt()
            finally:
                call.cancel()
        raise error


async def _whole(completion: Completion, frames: AsyncGenerator[Frame, None]) -> Response:
    async with aclosing(frames):
        async for frame in frames:
            completion.chunk(frame)
            if completion.finish_reason is not None:
                break
    return JSONResponse(completion.whole())


async def _events(
    completion: Completion, first: Frame, frames: AsyncGenerator[Frame, None]
) -> AsyncIterator[str]:
    """An error in the middle is an event of its own, and then there is no [DONE]."""
    async with aclosing(frames):
        try:
            completion.chunk(first)  # Accepted
            async for frame in frames:
                if (chunk := completion.chunk(frame)) is not None:
                    yield _event(chunk)
                if completion.finish_reason is not None:
                    break
        except HttpError as error:
            yield _event(error.body)
            return
        options = completion.asked.stream_options
        if options is not None and options.include_usage:
            yield _event(completion.usage_chunk())
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> object:
    """Raises `InvalidBody`."""
    parts = bytearray()
    async for part in request.stream():
        parts += part
        if len(parts) > MAX_PUBLIC_MESSAGE_BYTES:
            raise HttpError(
                413,
                "invalid_request_error",
                f"the body has more than {MAX_PUBLIC_MESSAGE_BYTES} bytes",
            )
    try:
        return json.loads(parts)
    except ValueError as error:
        raise InvalidBody(f"the body is not JSON: {error}") from None


async def _unless_gone(request: Request, work: Awaitable[Answer]) -> Answer:
    """What comes of the work; it is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HttpError(CLIENT_LEFT, "cancelled_error", "the client has left")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait([working, leaving])


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _any_serves(gateways: Gateways) -> bool:
    for channel in await gateways.in_turn():
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError:
            gateways.doubt()
            continue
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return True
    return False
