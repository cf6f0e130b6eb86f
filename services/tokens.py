"""Bearer tokens: which ones a server accepts, and how a client shows its own.

A server reads them from a file, one a line, and reads it again when it changes. Health can be asked
without one: whoever starts and stops us asks it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio

log = logging.getLogger(__name__)

AUTHORIZATION_KEY = "authorization"
MIN_TOKEN_LENGTH = 16
LOOK_SECONDS = 1.0
_SCHEME = "bearer "
_OPEN_TO_ALL = ("/grpc.health.v1.Health/",)


class TokensUnusable(Exception):
    """The file cannot be read, or holds no token that is long enough; the message names it."""


class TokenFile:
    """The tokens that are accepted now. Empty lines and those that begin with # are none."""

    def __init__(self, file: Path, look_seconds: float = LOOK_SECONDS) -> None:
        """`look_seconds` lie between two looks at it. Raises `TokensUnusable`."""
        self._file = file
        self._look_seconds = look_seconds
        self._modified_ns = -1
        self._digests: tuple[bytes, ...] = ()
        self._looked_at = time.monotonic()
        self._read()

    def __contains__(self, token: str) -> bool:
        self._look()
        digest = _digest(token)
        # All of them, so that the time tells nothing of which one it is.
        return any([hmac.compare_digest(digest, known) for known in self._digests])

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < self._look_seconds:
            return
        self._looked_at = now
        try:
            self._read()
        except TokensUnusable as error:  # in the middle of being replaced, or a mistake
            log.warning("tokens_not_read why=%s", error)

    def _read(self) -> None:
        try:
            modified_ns = self._file.stat().st_mtime_ns
        except OSError as error:
            raise _unreadable(self._file, error) from None
        if modified_ns != self._modified_ns:
            self._digests = tuple(_digest(token) for token in _tokens_in(self._file))
            self._modified_ns = modified_ns


class RequireToken(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every call without an accepted token as UNAUTHENTICATED."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler_call_details.method.startswith(_OPEN_TO_ALL):
            return await continuation(handler_call_details)
        shown = _shown(handler_call_details.invocation_metadata or ())
        if shown is None:
            return _refused("this server wants a bearer token in the metadata key authorization")
        if shown not in self._tokens:
            return _refused("the bearer token is not one that this server knows")
        return await continuation(handler_call_details)


class TokenChannel(grpc.aio.Channel):
    """Another channel, with the token in each call.

    Not by gRPC's own call credentials: those refuse a connection without TLS, and on the loopback
    interface there may be none.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._header = (AUTHORIZATION_KEY, f"Bearer {token}")

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._shown(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._shown(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._shown(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._shown(self._channel.stream_stream(*args, **kwargs))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        await self.close()

    def _shown(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def with_token(*args: Any, metadata: Sequence[Any] | None = None, **kwargs: Any) -> Any:
            return call(*args, metadata=(*(metadata or ()), self._header), **kwargs)

        return with_token


def first_token(file: Path) -> str:
    """Of a file with at least one. Raises `TokensUnusable`."""
    return _tokens_in(file)[0]


def _tokens_in(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise TokensUnusable(f"{file} holds no token")
    for number, token in enumerate(tokens, 1):  # which one, and not what it is
        if len(token) < MIN_TOKEN_LENGTH:
            raise TokensUnusable(
                f"token {number} in {file} has {len(token)} characters: at least "
                f"{MIN_TOKEN_LENGTH} are wanted"
            )
        if not (token.isascii() and token.isprintable()):
            raise TokensUnusable(f"token {number} in {file} has characters no header can carry")
    return tokens


def _unreadable(file: Path, error: OSError | UnicodeDecodeError) -> TokensUnusable:
    reason = error.strerror if isinstance(error, OSError) else "it is not text"
    return TokensUnusable(f"cannot read the tokens in {file}: {reason}")


def _shown(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for key, value in metadata:
        if key == AUTHORIZATION_KEY and isinstance(value, str) and value[:7].lower() == _SCHEME:
            return value[7:].strip()
    return None


def _refused(why: str) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    # On the wire every kind of call is a stream both ways, and this one reads nothing first.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
