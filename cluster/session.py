"""`model1 session`: what a gateway says of conversations, and what it is told to do with them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from google.protobuf.message import Message

from cluster.access import Access
from cluster.client import connected, named_failures
from cluster.output import text_table
from cluster.plain import as_json
from cluster.session_file import SessionFileError, new_session_file, read_session
from protos import sessions_pb2, sessions_pb2_grpc
from services.session_record import IMPORT_ACCEPTED

HEADER = ("session", "tokens", "version", "last used", "pinned", "worker", "state")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionCommand:
    """One question to one gateway, printed as a table or as JSON."""

    access: Access
    cache_salt: str
    as_json: bool

    async def list_all(self, max_sessions: int) -> None:
        request = sessions_pb2.ListSessionsRequest(
            cache_salt=self.cache_salt, max_sessions=max_sessions
        )
        async with self._stub() as stub:
            answer = await stub.List(request)
        self._print(answer, lambda: _table(answer.sessions))

    async def show(self, session_id: str, *, with_history: bool) -> None:
        request = sessions_pb2.ShowSessionRequest(
            name=self._name(session_id), with_history=with_history
        )
        async with self._stub() as stub:
            answer = await stub.Show(request)
        self._print(answer, lambda: _shown(answer, with_history=with_history))

    async def pin(self, session_id: str, seconds: float) -> None:
        request = sessions_pb2.PinSessionRequest(name=self._name(session_id), seconds=seconds)
        async with self._stub() as stub:
            answer = await stub.Pin(request)
        self._print(answer, lambda: _table([answer.session]))

    async def unpin(self, session_id: str) -> None:
        request = sessions_pb2.UnpinSessionRequest(name=self._name(session_id))
        async with self._stub() as stub:
            answer = await stub.Unpin(request)
        self._print(answer, lambda: _table([answer.session]))

    async def prefetch(self, session_id: str) -> None:
        request = sessions_pb2.PrefetchSessionRequest(name=self._name(session_id))
        async with self._stub() as stub:
            answer = await stub.Prefetch(request)
        self._print(answer, lambda: _where(answer.kv))

    async def release(self, session_id: str) -> None:
        request = sessions_pb2.ReleaseSessionRequest(name=self._name(session_id))
        async with self._stub() as stub:
            answer = await stub.Release(request)
        self._print(answer, lambda: f"{answer.blocks} blocks left the devices")

    async def delete(self, session_id: str, *, with_kv: bool) -> None:
        request = sessions_pb2.DeleteSessionRequest(name=self._name(session_id), with_kv=with_kv)
        async with self._stub() as stub:
            answer = await stub.Delete(request)
        self._print(answer, lambda: f"session {session_id!r} is forgotten")

    async def export(self, session_id: str, file: Path, *, without_kv: bool) -> None:
        request = sessions_pb2.ExportSessionRequest(
            name=self._name(session_id), without_kv=without_kv
        )
        num_bytes = 0
        async with self._stub() as stub:
            with new_session_file(file) as write:
                async for part in stub.Export(request):
                    write(part)
                    num_bytes += part.ByteSize()
        if self.as_json:
            print(json.dumps({"file": str(file), "bytes": num_bytes}))
        else:
            print(f"{file}: {num_bytes} bytes")

    async def import_from(self, session_id: str, file: Path) -> None:
        async with self._stub() as stub:
            unread: list[SessionFileError] = []
            parts = _noted(read_session(file), unread)
            try:
                call = stub.Import(
                    _requests(self._name(session_id), parts, lambda: call.initial_metadata())
                )
                answer = await call
            except asyncio.CancelledError:
                if unread:  # gRPC gives a call up when its parts fail, and does not tell why
                    raise unread[0] from None
                raise
        self._print(
            answer,
            lambda: (
                f"{_table([answer.session])}\n"
                f"{answer.kept_blobs} blobs taken in, {answer.refused_blobs} refused"
            ),
        )

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[sessions_pb2_grpc.SessionsStub]:
        async with connected(self.access) as client:
            with named_failures(self.access.endpoint):
                yield sessions_pb2_grpc.SessionsStub(client.channel)

    def _name(self, session_id: str) -> sessions_pb2.SessionName:
        return sessions_pb2.SessionName(session_id=session_id, cache_salt=self.cache_salt)

    def _print(self, answer: Message, as_text: Callable[[], str]) -> None:
        print(as_json(answer) if self.as_json else as_text())


def _noted(
    parts: Iterator[sessions_pb2.ExportSessionResponse], unread: list[SessionFileError]
) -> Iterator[sessions_pb2.ExportSessionResponse]:
    """The same parts; why there are no more of them is in `unread` as well."""
    try:
        yield from parts
    except SessionFileError as error:
        unread.append(error)
        raise


async def _requests(
    name: sessions_pb2.SessionName,
    parts: Iterator[sessions_pb2.ExportSessionResponse],
    told: Callable[[], Awaitable[grpc.aio.Metadata]],
) -> AsyncIterator[sessions_pb2.ImportSessionRequest]:
    """The blobs follow once the gateway has taken the session: gRPC may put INTERNAL in the place
    of a refusal that meets a write."""
    for part in parts:
        if part.WhichOneof("part") == "history":
            session = sessions_pb2.ImportSession(name=name, history=part.history)
            yield sessions_pb2.ImportSessionRequest(session=session)
            if IMPORT_ACCEPTED not in tuple(await told() or ()):
                return
        else:
            yield sessions_pb2.ImportSessionRequest(blob=part.blob)


def _shown(answer: sessions_pb2.ShowSessionResponse, *, with_history: bool) -> str:
    text = f"{_table([answer.session])}\n{_where(answer.kv)}"
    return f"{text}\n\n{answer.text}" if with_history else text


def _table(sessions: Iterable[sessions_pb2.Session]) -> str:
    now_s = time.time()
    rows = [
        (
            each.session_id,
            each.num_tokens,
            each.version,
            f"{_span(now_s - each.last_used_unix_seconds)} ago",
            _pinned(each.pinned_until_unix_seconds - now_s),
            each.worker or "-",
            "in a turn" if each.in_turn else "idle",
        )
        for each in sessions
    ]
    return text_table(HEADER, rows)


def _where(kv: sessions_pb2.SessionKv) -> str:
    tokens = {
        "in memory": kv.ram_tokens,
        "on disk": kv.disk_tokens,
        "on other nodes": kv.peer_tokens,
        "in Redis": kv.cold_tokens,
        "nowhere below the device": kv.missing_tokens,
    }
    return "tokens with KV " + ", ".join(f"{where} {num}" for where, num in tokens.items())


def _pinned(seconds: float) -> str:
    return f"for {_span(seconds)}" if seconds > 0 else "-"


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
