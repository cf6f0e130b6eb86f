"""What an HTTP client is told of a request that failed: OpenAI's error object, and the status."""

import grpc
from starlette.responses import JSONResponse

# After which a client may ask again; what gateways say in gRPC's own words.
RETRY_AFTER_SECONDS = 1

# gRPC status -> (HTTP status, OpenAI's type of error).
_OF_STATUS: dict[grpc.StatusCode, tuple[int, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.ALREADY_EXISTS: (409, "conflict_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (409, "conflict_error"),
    grpc.StatusCode.ABORTED: (409, "conflict_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.CANCELLED: (499, "cancelled_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "server_error"),
}


class HttpError(Exception):
    """A request that ends with this status and these words."""

    def __init__(self, status: int, kind: str, words: str, param: str | None = None) -> None:
        super().__init__(words)
        self.status = status
        self.body = {
            "error": {"message": words, "type": kind, "param": param, "code": None},
        }

    def response(self) -> JSONResponse:
        retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers=retry)


class InvalidBody(HttpError):
    """What was sent is not a request that we can answer; `param` names the field."""

    def __init__(self, words: str, param: str | None = None) -> None:
        super().__init__(400, "invalid_request_error", words, param)


class UnknownModel(HttpError):
    def __init__(self, asked: str, served: str) -> None:
        words = f"the model {asked!r} is not served here; {served!r} is"
        super().__init__(404, "not_found_error", words, "model")


def from_rpc_error(error: grpc.aio.AioRpcError) -> HttpError:
    status, kind = _OF_STATUS.get(error.code(), (500, "server_error"))
    return HttpError(status, kind, error.details() or error.code().name)
