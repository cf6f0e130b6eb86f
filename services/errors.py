"""What a service can answer instead of a result, and the gRPC status of each.

    ServiceError
    |- DuplicateRequest       a live request has this id already
    |- UnknownRequest         no live request has this id
    |- SessionBusy            a turn of the session is under way
    |- SessionChanged         somebody else wrote the session meanwhile
    |- SessionLost            what was said in the session is nowhere any more
    |- SessionExists          there is a session of this name already
    |- UnknownSession         there is no session of this name
    |- SessionsOff            the deployment has nobody who keeps sessions
    |- QueueFull              a bounded queue has no room now; worth a retry
    |- DeadlineExceeded       the caller's deadline passed before the answer was complete
    |- RequestCancelled       someone aborted the request
    |- Unavailable            a peer is gone or going; worth a retry elsewhere
    |  |- Draining            this process admits nothing any more
    |  |- WorkerUnavailable   no attention worker takes the request
    |  |- ExpertNotHeld       the replica does not hold the expert now; another one does
    |  `- ExpertsUnavailable  a layer's routed experts did not answer
    |- UnknownActor           the deployment has no actor of this name
    |- ChangeRefused          the deployment could not serve any more after such a change
    |- ChangeFailed           a change could not be made, and everything is as it was
    |- ModelMismatch          two processes do not hold the same model
    `- InternalFailure        a bug of ours; the log of the process that raised it knows more

Errors of the model (model1.errors) have their status here too. Does not know who raises what.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from model1 import errors as model_errors

log = logging.getLogger(__name__)

RETRY_DELAY_S = 1.0
# Characters. They travel in a header, percent-encoded, and gRPC takes 8 KB of headers.
MAX_STATUS_WORDS = 512
_STATUS_DETAILS_KEY = "grpc-status-details-bin"


class ServiceError(Exception):
    """Base of every error that a service raises on purpose."""


class DuplicateRequest(ServiceError):
    """A live request has this id already."""


class UnknownRequest(ServiceError):
    """No live request has this id."""


class SessionBusy(ServiceError):
    """A turn of the session is under way; one at a time."""


class SessionChanged(ServiceError):
    """Somebody else wrote the session meanwhile; nothing of this turn is kept."""


class SessionLost(ServiceError):
    """What was said in the session is nowhere any more; the next turn begins it anew."""


class SessionExists(ServiceError):
    """There is a session of this name already."""


class UnknownSession(ServiceError):
    """There is no session of this name."""


class SessionsOff(ServiceError):
    """The deployment has nobody who keeps sessions."""


class QueueFull(ServiceError):
    """A bounded queue has no room now."""


class DeadlineExceeded(ServiceError):
    """The caller's deadline passed before the answer was complete."""


class RequestCancelled(ServiceError):
    """The request was aborted."""


class Unavailable(ServiceError):
    """A peer is gone or going."""


class Draining(Unavailable):
    """This process admits nothing any more."""


class WorkerUnavailable(Unavailable):
    """No attention worker takes the request."""


class ExpertNotHeld(Unavailable):
    """The replica does not hold the expert now: whoever asks has an old table."""


class ExpertsUnavailable(Unavailable):
    """The routed experts of a layer did not answer."""


class UnknownActor(ServiceError):
    """The deployment has no actor of this name."""


class ChangeRefused(ServiceError):
    """The deployment could not serve any more after such a change."""


class ChangeFailed(ServiceError):
    """A change of the deployment could not be made, and everything is as it was."""


class ModelMismatch(ServiceError):
    """Two processes do not hold the same model."""


class InternalFailure(ServiceError):
    """A bug of ours."""


STATUS: dict[type[Exception], grpc.StatusCode] = {
    ServiceError: grpc.StatusCode.INTERNAL,
    DuplicateRequest: grpc.StatusCode.ALREADY_EXISTS,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    SessionBusy: grpc.StatusCode.FAILED_PRECONDITION,
    SessionChanged: grpc.StatusCode.ABORTED,
    SessionLost: grpc.StatusCode.DATA_LOSS,
    SessionExists: grpc.StatusCode.ALREADY_EXISTS,
    UnknownSession: grpc.StatusCode.NOT_FOUND,
    SessionsOff: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Draining: grpc.StatusCode.UNAVAILABLE,
    WorkerUnavailable: grpc.StatusCode.UNAVAILABLE,
    ExpertNotHeld: grpc.StatusCode.UNAVAILABLE,
    ExpertsUnavailable: grpc.StatusCode.UNAVAILABLE,
    UnknownActor: grpc.StatusCode.NOT_FOUND,
    ChangeRefused: grpc.StatusCode.FAILED_PRECONDITION,
    ChangeFailed: grpc.StatusCode.ABORTED,
    ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    InternalFailure: grpc.StatusCode.INTERNAL,
    model_errors.ModelError: grpc.StatusCode.INTERNAL,
    model_errors.ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    model_errors.CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    model_errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    model_errors.PoolExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

# The way back: what a caller raises for a peer's status. Any other status is a bug of the peer.
_RAISED_FOR: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.ALREADY_EXISTS: DuplicateRequest,
    grpc.StatusCode.NOT_FOUND: UnknownRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
    grpc.StatusCode.ABORTED: SessionChanged,
    grpc.StatusCode.DATA_LOSS: SessionLost,
    grpc.StatusCode.INVALID_ARGUMENT: model_errors.InvalidRequest,
}


def from_rpc_error(error: grpc.aio.AioRpcError) -> Exception:
    """The named error for what a peer answered, with the peer's own words."""
    raised = _RAISED_FOR.get(error.code(), InternalFailure)
    return raised(error.details() or f"the peer answered {error.code().name} and no reason")


@asynccontextmanager
async def ending_with_status(
    context: grpc.aio.ServicerContext[Any, Any], request_id: str = ""
) -> AsyncIterator[None]:
    """The edge of every handler: named errors become their status, any other is logged once."""
    try:
        yield
    except (ServiceError, model_errors.ModelError) as error:
        await _abort(context, STATUS[type(error)], str(error))
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise  # the call has ended already: aborted, or its client is gone
    except Exception:
        # Not checked yet: whatever the client sent, in one short line.
        log.exception("request_failed request_id=%r", request_id[:128])
        await _abort(context, grpc.StatusCode.INTERNAL, "internal error; see the server's log")


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], status: grpc.StatusCode, words: str
) -> None:
    words = words[:MAX_STATUS_WORDS]
    if status is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        await context.abort(status, words)
    retry = error_details_pb2.RetryInfo(
        retry_delay=duration_pb2.Duration(seconds=int(RETRY_DELAY_S))
    )
    detail = any_pb2.Any()
    detail.Pack(retry)
    rich = status_pb2.Status(code=status.value[0], message=words, details=[detail])
    metadata = ((_STATUS_DETAILS_KEY, rich.SerializeToString()),)
    await context.abort(status, words, trailing_metadata=metadata)
