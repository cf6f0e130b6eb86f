"""An attention worker that does what a test tells it, over real gRPC: for exact moments."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc

from protos import attention_pb2, attention_pb2_grpc, inference_pb2
from services import rpc
from services.gateway.worker import WorkerAddress

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Request: TypeAlias = attention_pb2.AttentionGenerateRequest
# Serves one Generate call.
Act: TypeAlias = Callable[[Request, Context], Awaitable[None]]

KV_ROOT = b"root"


class ScriptedWorker(attention_pb2_grpc.AttentionServicer):
    """Plays its acts in turn, the last one again and again; keeps what it was asked."""

    def __init__(self, name: str, *acts: Act) -> None:
        self.name = name
        self.acts = list(acts)
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.is_draining = False
        self.num_stats = 0  # that it was asked for

    async def Generate(self, request: Request, context: Context) -> None:
        self.requests.append(request)
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        await act(request, context)

    async def Abort(
        self, request: attention_pb2.AttentionAbortRequest, context: Context
    ) -> attention_pb2.AttentionAbortResponse:
        self.aborted.append(request.request_id)
        return attention_pb2.AttentionAbortResponse()

    async def Stats(
        self, request: attention_pb2.AttentionStatsRequest, context: Context
    ) -> attention_pb2.AttentionStatsResponse:
        self.num_stats += 1
        return attention_pb2.AttentionStatsResponse(worker=self.name, draining=self.is_draining)


@asynccontextmanager
async def serving(
    *workers: ScriptedWorker, address: str = "127.0.0.1:0"
) -> AsyncIterator[list[WorkerAddress]]:
    servers = []
    for worker in workers:
        register = partial(attention_pb2_grpc.add_AttentionServicer_to_server, worker)
        service = rpc.Service("model1.v1.Attention", register)
        servers.append(await rpc.start_server([service], address))
    try:
        yield [
            WorkerAddress(worker.name, server.address)
            for worker, server in zip(workers, servers, strict=True)
        ]
    finally:
        for server in servers:
            await server.stop(0)


async def accept(context: Context, kv_root: bytes = KV_ROOT) -> None:
    accepted = attention_pb2.AttentionAccepted(kv_root=kv_root)
    await context.write(attention_pb2.AttentionGenerateResponse(accepted=accepted))


async def give(context: Context, token_ids: Sequence[int], computed_tokens: int = 0) -> None:
    """`computed_tokens` of the prompt, said with the first tokens."""
    kv = inference_pb2.KvUsage(computed_tokens=computed_tokens) if computed_tokens else None
    tokens = attention_pb2.AttentionTokens(token_ids=token_ids, kv=kv)
    await context.write(attention_pb2.AttentionGenerateResponse(tokens=tokens))


async def finish(context: Context) -> None:
    final = attention_pb2.AttentionFinal(finish_reason=inference_pb2.FINISH_REASON_LENGTH)
    await context.write(attention_pb2.AttentionGenerateResponse(final=final))


def counts_up(num_tokens: int, ends_with: grpc.StatusCode | None = None) -> Act:
    """Each token is one more than the last; after `num_tokens` it finishes, or fails."""

    async def act(request: Request, context: Context) -> None:
        await accept(context)
        first = request.token_ids[-1] + 1
        for token in range(first, first + num_tokens):
            await give(context, [token], len(request.token_ids) if token == first else 0)
        if ends_with is None:
            await finish(context)
        else:
            await context.abort(ends_with, "as the script says")

    return act


def finishes() -> Act:
    """Counts up as far as it was asked to."""

    async def act(request: Request, context: Context) -> None:
        await counts_up(request.max_tokens)(request, context)

    return act


def refuses(status: grpc.StatusCode) -> Act:
    async def act(request: Request, context: Context) -> None:
        await context.abort(status, "as the script says")

    return act
