"""Owns how every role opens a gRPC server and a channel: options, health, reflection, and shutdown.

Knows no role, no message and no tensor. Addresses are "HOST:PORT" (port 0 picks a free one) or
"unix:/path".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from services.tls import Tls

# One layer crossing of a 4,096-token chunk at hidden size 7,168 in float32 is 117 MB.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
# A prompt of a million tokens as text is about 4 MB; strangers can send nothing larger.
MAX_PUBLIC_MESSAGE_BYTES = 16 * 1024 * 1024
KEEPALIVE_INTERVAL_MS = 10_000
# Long enough for a starved machine: a peer taken for dead loses every call on the connection.
KEEPALIVE_TIMEOUT_MS = 15_000
MAX_RECONNECT_BACKOFF_MS = 2_000
# A try at a Unix socket is one system call, and whoever waits there waits for a restart.
MAX_LOCAL_RECONNECT_BACKOFF_MS = 100
DEFAULT_GRACE_SECONDS = 5.0

_SHARED_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # Without these two a frozen peer was not noticed in 100 s (measured with SIGSTOP): pings stop
    # after two on a silent stream, and an unanswered one is waited for for a minute.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *_SHARED_OPTIONS,
    # With SO_REUSEPORT a second server on the same port starts without complaint and takes half of
    # the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_INTERVAL_MS // 2),
]
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_SHARED_OPTIONS,
    # Long-lived streams must not share a connection (and its one write lock) with other channels.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
    # Peers sit on the cluster's own network; a proxy from the environment would swallow them.
    ("grpc.enable_http_proxy", 0),
]


class AddressUnavailable(RuntimeError):
    """The address that a server was told to listen on is taken or cannot be bound."""


async def _nothing_to_drain() -> None:
    return None


class Service(NamedTuple):
    """One gRPC service of a server.

    `drain` ends what the service has under way (long-lived streams do not end by themselves) and
    is awaited at most the grace time when the server stops.
    """

    full_name: str  # "model1.v1.Router"
    register: Callable[[grpc.aio.Server], None]  # partial(add_RouterServicer_to_server, servicer)
    drain: Callable[[], Awaitable[None]] = _nothing_to_drain


class RunningServer:
    """A started server. `address` carries the real port; `stop` is idempotent."""

    def __init__(
        self,
        server: grpc.aio.Server,
        health: HealthServicer,
        services: Sequence[Service],
        address: str,
    ) -> None:
        self.address = address
        self._server = server
        self._health = health
        self._services = tuple(services)
        self._stopping: asyncio.Task[None] | None = None

    async def set_serving(self, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *(service.full_name for service in self._services)):
            await self._health.set(name, status)

    async def stop(self, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> None:
        """Report NOT_SERVING, drain until the grace time, abort the rest, close."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace_seconds))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_seconds
        await self._health.enter_graceful_shutdown()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await asyncio.gather(*(service.drain() for service in self._services))
        finally:  # also when a drain fails: a server that was told to stop must not go on listening
            await self._server.stop(max(0.0, deadline - loop.time()))

    async def wait_until_stopped(self) -> None:
        await self._server.wait_for_termination()

    async def __aenter__(self) -> RunningServer:
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        await self.stop()


async def start_server(
    services: Sequence[Service],
    address: str,
    extra_addresses: Sequence[str] = (),
    *,
    max_receive_bytes: int = MAX_MESSAGE_BYTES,
    tls: Tls | None = None,
    require_client_certificate: bool = True,
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
) -> RunningServer:
    """Serve `services` with health and reflection; raises AddressUnavailable naming the address.

    With `tls` every address but a Unix socket is served by it alone; raises TlsUnusable.

    `extra_addresses` are further listeners of the same server (a router listens on its node's Unix
    socket and, when asked to, on TCP).
    """
    options = {**dict(SERVER_OPTIONS), "grpc.max_receive_message_length": max_receive_bytes}
    server = grpc.aio.server(interceptors=interceptors, options=list(options.items()))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for service in services:
        service.register(server)
    names = [service.full_name for service in services]
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection([*names, health_name, reflection.SERVICE_NAME], server)
    credentials = None
    if tls is not None:
        credentials = tls.server_credentials(require_client=require_client_certificate)
    bound = _bind(server, address, credentials)
    for extra in extra_addresses:
        _bind(server, extra, credentials)
    await server.start()
    running = RunningServer(server, health, services, bound)
    await running.set_serving(True)
    return running


def channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """A channel to one peer with the same limits as the servers; use it as a context manager.

    With `tls` the peer has to show a certificate, unless it is at a Unix socket: who may open that
    is the file system's to say. Raises TlsUnusable.
    """
    options: dict[str, int | str] = dict(CHANNEL_OPTIONS)
    if address.startswith("unix:"):
        options["grpc.max_reconnect_backoff_ms"] = MAX_LOCAL_RECONNECT_BACKOFF_MS
    if tls is None or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=list(options.items()))
    if tls.server_name is not None:
        options["grpc.ssl_target_name_override"] = tls.server_name
    credentials = tls.channel_credentials()
    return grpc.aio.secure_channel(address, credentials, options=list(options.items()))


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    is_local = address.startswith("unix:")
    if is_local:
        _refuse_live_socket(address)
    try:
        if credentials is None or is_local:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressUnavailable(
            f"cannot listen on {address}: it is in use or is not an address of this host"
        ) from error
    if is_local:
        return address
    host, _, _ = address.rpartition(":")
    return f"{host}:{port}"


def _refuse_live_socket(address: str) -> None:
    # gRPC unlinks an existing socket file before it binds, and so steals it from a live server.
    path = address.removeprefix("unix:")
    if not os.path.exists(path):
        return
    with (
        socket.socket(socket.AF_UNIX) as probe,
        contextlib.suppress(ConnectionRefusedError, FileNotFoundError),
    ):
        probe.connect(path)
        raise AddressUnavailable(f"cannot listen on {address}: a server is listening there")
