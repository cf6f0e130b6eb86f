"""The connections to a Redis, and whether it may be asked now. The only module that speaks Redis.

A server that cannot be reached, refuses us, is full or slow is left alone and probed now and then.
Knows no blob and no key. Thread-safe; each answer is waited for for at most the timeout.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from services.kvstore.breaker import Breaker

log = logging.getLogger(__name__)

# A command as it goes out. Memory views are sent as they are, without a copy.
Command: TypeAlias = tuple[bytes | memoryview | str | int | float, ...]

_ERRORS = (redis.RedisError, redis.exceptions.RedisClusterException, OSError)
_SCHEMES = ("redis", "rediss", "unix")
_PROBE_KEY = b"model1:probe"
_PROBE_TTL_MS = 10_000
_MAX_REASON_CHARACTERS = 200
# Longer arguments go to the socket from where they lie. hiredis would copy them into one string,
# which costs more than all the rest for those of 256 KB (1.0 to 2.5 s a GB against 0.3, measured).
_COPY_BELOW_BYTES = 6000


@dataclass(frozen=True, slots=True)
class RedisConfig:
    """`url` is redis://, rediss:// (TLS, verified) or unix://, and best has no password in it."""

    url: str = field(repr=False)
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None  # who signed the server's certificate; none: the system's
    timeout_seconds: float = 1.0
    slow_seconds: float = 0.15  # an answer that takes so long costs more than it saves
    probe_seconds: float = 1.0
    max_connections: int = 8

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in _SCHEMES:
            raise ValueError(f"a Redis URL starts with one of {', '.join(_SCHEMES)}")


class RedisDown(Exception):
    """The server cannot be used for this now; the message says why, without secrets."""


class RedisLink:
    """A pool of connections to one server behind one breaker. If it turns out to be of a cluster,
    all nodes of that are used; what one of them fails is a failure of the whole."""

    def __init__(self, config: RedisConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures: Counter[str] = Counter()  # by the class of the error
        self._config = config
        self._clock = clock
        self._breaker = Breaker(
            slow_seconds=config.slow_seconds, probe_seconds=config.probe_seconds, clock=clock
        )
        self._client: redis.Redis | redis.RedisCluster = _client(config)
        self._is_cluster = False

    @property
    def degraded(self) -> str | None:
        """Why the server is not fully used now, or None."""
        return self._breaker.reason

    @property
    def is_readable(self) -> bool:
        return self._breaker.allows_reads

    @property
    def is_writable(self) -> bool:
        return self._breaker.allows_writes

    def call(self, *command: bytes | memoryview | str | int | float, writes: bool) -> Any:
        """The answer to one command; raises RedisDown."""
        with self._asking(writes=writes):
            return self._execute(*command)

    def batch(self, commands: Sequence[Command], *, writes: bool) -> list[Any]:
        """The answers to several commands sent at once, not as a transaction; raises RedisDown."""
        if not commands:
            return []
        with (
            self._asking(writes=writes, num_answers=len(commands)),
            self._client.pipeline(transaction=False) as pipeline,
        ):
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

    def set_if_prefix(self, key: bytes, prefix: bytes, value: bytes, ttl_ms: int) -> bool:
        """SET the key, unless what is there does not start with `prefix` (nothing starts with b"").

        Raises RedisDown.
        """
        with self._asking(writes=True), self._client.pipeline(transaction=True) as pipeline:
            pipeline.watch(key)
            there = pipeline.getrange(key, 0, max(len(prefix) - 1, 0))
            if there != prefix:
                return False
            pipeline.multi()
            pipeline.set(key, value, px=ttl_ms)
            try:
                pipeline.execute()
            except redis.WatchError:
                return False
            return True

    def scan(self, pattern: bytes) -> Iterator[bytes]:
        """Every key that matches; raises RedisDown."""
        with self._asking(writes=False):
            yield from self._client.scan_iter(match=pattern, count=1000)

    def tick(self) -> None:
        """To be called about once a second: probes a server that is left alone."""
        if not self._breaker.wants_probe:
            return
        try:
            if self._is_cluster and not isinstance(self._client, redis.RedisCluster):
                self.close()
                self._client = _cluster_client(self._config)
            started = self._clock()
            for command in (
                ("SET", _PROBE_KEY, b"1", "PX", _PROBE_TTL_MS),
                ("GET", _PROBE_KEY),
            ):
                self._execute(*command)
            seconds = (self._clock() - started) / 2
        except _ERRORS as error:
            self._note(error)
            return
        if seconds >= self._config.slow_seconds:
            self._breaker.failed(f"slow: {seconds * 1000:.0f} ms for an answer")
            return
        self._breaker.recovered()
        log.info("redis_recovered")

    def close(self) -> None:
        self._client.close()
        if not isinstance(self._client, redis.RedisCluster):
            self._client.connection_pool.disconnect()  # not the client's own, so that left it open

    def _execute(self, *command: bytes | memoryview | str | float) -> Any:
        client: Any = self._client  # redis-py leaves the method untyped
        return client.execute_command(*command)

    @contextmanager
    def _asking(self, *, writes: bool, num_answers: int = 1) -> Iterator[None]:
        breaker = self._breaker
        if not (breaker.allows_writes if writes else breaker.allows_reads):
            raise RedisDown(breaker.reason)
        started = self._clock()
        try:
            yield
        except _ERRORS as error:
            self._note(error)
            raise RedisDown(breaker.reason) from None  # the words of the cause may tell too much
        seconds = (self._clock() - started) / num_answers
        # A quick batch says little of how long a round trip takes.
        is_telling = num_answers == 1 or seconds >= self._config.slow_seconds
        if is_telling and breaker.answered(seconds):
            log.warning("redis_degraded reason=%s", breaker.reason)

    def _note(self, error: Exception) -> None:
        self.failures[type(error).__name__] += 1
        if isinstance(error, redis.exceptions.MovedError):
            self._is_cluster = True
        refuses_writes = isinstance(error, redis.OutOfMemoryError | redis.ReadOnlyError)
        reason = self._without_secrets(_words(error, self._config.timeout_seconds))
        if self._breaker.failed(reason, reads_work=refuses_writes):
            log.warning("redis_degraded reason=%s", reason)
        if not refuses_writes:
            # A pooled connection may be to a server that is gone, or have half an answer in it.
            if isinstance(self._client, redis.RedisCluster):
                self._client.disconnect_connection_pools()
            else:
                self._client.connection_pool.disconnect(inuse_connections=False)

    def _without_secrets(self, words: str) -> str:
        for secret in (self._config.password, urlsplit(self._config.url).password):
            if secret:
                words = words.replace(secret, "***")
        return words[:_MAX_REASON_CHARACTERS]


def _client(config: RedisConfig) -> redis.Redis:
    pool = redis.BlockingConnectionPool.from_url(
        config.url,
        timeout=config.timeout_seconds,  # for a connection, when all are in use
        command_packer=PythonRespSerializer(_COPY_BELOW_BYTES, _encoded),
        **_options(config),
    )
    return redis.Redis(connection_pool=pool)


def _cluster_client(config: RedisConfig) -> redis.RedisCluster:
    """Connected to the nodes that the one of the URL knows."""
    return redis.RedisCluster.from_url(config.url, **_options(config))


def _options(config: RedisConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_timeout": config.timeout_seconds,
        "socket_connect_timeout": config.timeout_seconds,
        "max_connections": config.max_connections,
        # The breaker decides when to ask again; a request does not wait for that.
        "retry": Retry(NoBackoff(), 0),
        "client_name": "model1",
        "protocol": 2,
    }
    if config.password is not None:
        options["password"] = config.password
    if config.ca_file is not None and config.url.startswith("rediss:"):
        options["ssl_ca_certs"] = str(config.ca_file)
    return options


def _encoded(argument: bytes | memoryview | str | float) -> bytes | memoryview:
    if isinstance(argument, bytes | memoryview):
        return argument
    return str(argument).encode()


def _words(error: Exception, timeout_seconds: float) -> str:
    match error:
        case redis.AuthenticationError() | redis.AuthenticationWrongNumberOfArgsError():
            return f"refuses our credentials: {error}"
        case redis.exceptions.NoPermissionError():
            return f"its ACL forbids what we need: {error}"
        case redis.OutOfMemoryError():
            return "out of memory"
        case redis.ReadOnlyError():
            return "read-only"
        case redis.exceptions.MovedError():
            return "is a cluster: its other nodes are yet to be found"
        case redis.BusyLoadingError():
            return "still loading its data"
        case redis.TimeoutError():
            return f"no answer in {timeout_seconds:g} s"
        case redis.ConnectionError():
            return f"cannot be reached: {error}"
        case _:
            return f"{type(error).__name__}: {error}"
