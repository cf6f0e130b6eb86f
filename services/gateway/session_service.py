"""The gRPC edge of what is done with sessions between their turns: model1.v1.Sessions."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import grpc
import xxhash

from model1.errors import InvalidRequest
from model1.tokenizer import Tokenizer
from protos import kvstore_pb2, sessions_pb2, sessions_pb2_grpc
from services import rpc
from services.errors import ending_with_status
from services.gateway.session_admin import History, Residence, SessionAdmin
from services.kvstore.tier import Tier
from services.session_record import IMPORT_ACCEPTED, SessionHead, SessionName, packed

DEFAULT_MAX_SESSIONS = 1000

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class SessionsService(sessions_pb2_grpc.SessionsServicer):
    def __init__(self, admin: SessionAdmin, tokenizer: Tokenizer) -> None:
        self._admin = admin
        self._tokenizer = tokenizer

    async def List(
        self, request: sessions_pb2.ListSessionsRequest, context: Context
    ) -> sessions_pb2.ListSessionsResponse:
        async with ending_with_status(context):
            max_sessions = request.max_sessions or DEFAULT_MAX_SESSIONS
            heads = await self._admin.heads(request.cache_salt, max_sessions)
        return sessions_pb2.ListSessionsResponse(sessions=[self._session(h) for h in heads])

    async def Show(
        self, request: sessions_pb2.ShowSessionRequest, context: Context
    ) -> sessions_pb2.ShowSessionResponse:
        async with ending_with_status(context):
            record = await self._admin.record(_name(request.name))
            residence = await self._admin.residence(record)
        shown = sessions_pb2.ShowSessionResponse(
            session=self._session(record.head), kv=_residence_to_wire(residence)
        )
        if request.with_history:
            shown.token_ids.extend(record.token_ids)
            shown.text = self._tokenizer.decode(record.token_ids)
        return shown

    async def Pin(
        self, request: sessions_pb2.PinSessionRequest, context: Context
    ) -> sessions_pb2.PinSessionResponse:
        async with ending_with_status(context):
            head = await self._admin.pin(_name(request.name), request.seconds)
        return sessions_pb2.PinSessionResponse(session=self._session(head))

    async def Unpin(
        self, request: sessions_pb2.UnpinSessionRequest, context: Context
    ) -> sessions_pb2.UnpinSessionResponse:
        async with ending_with_status(context):
            head = await self._admin.unpin(_name(request.name))
        return sessions_pb2.UnpinSessionResponse(session=self._session(head))

    async def Prefetch(
        self, request: sessions_pb2.PrefetchSessionRequest, context: Context
    ) -> sessions_pb2.PrefetchSessionResponse:
        async with ending_with_status(context):
            residence = await self._admin.prefetch(_name(request.name))
        return sessions_pb2.PrefetchSessionResponse(kv=_residence_to_wire(residence))

    async def Release(
        self, request: sessions_pb2.ReleaseSessionRequest, context: Context
    ) -> sessions_pb2.ReleaseSessionResponse:
        async with ending_with_status(context):
            blocks = await self._admin.release(_name(request.name))
        return sessions_pb2.ReleaseSessionResponse(blocks=blocks)

    async def Delete(
        self, request: sessions_pb2.DeleteSessionRequest, context: Context
    ) -> sessions_pb2.DeleteSessionResponse:
        async with ending_with_status(context):
            await self._admin.delete(_name(request.name), with_kv=request.with_kv)
        return sessions_pb2.DeleteSessionResponse()

    async def Export(self, request: sessions_pb2.ExportSessionRequest, context: Context) -> None:
        async with ending_with_status(context):
            record = await self._admin.record(_name(request.name))
            history = sessions_pb2.SessionHistory(
                token_ids=record.token_ids,
                kv_root=record.head.kv_root,
                created_unix_seconds=record.head.created_s,
                checksum=_checksum(record.token_ids, record.head.kv_root),
            )
            await context.write(sessions_pb2.ExportSessionResponse(history=history))
            if request.without_kv:
                return
            async with aclosing(self._admin.blobs(record)) as parts:
                async for part in parts:
                    await context.write(sessions_pb2.ExportSessionResponse(blob=part))

    async def Import(
        self,
        request_iterator: AsyncIterator[sessions_pb2.ImportSessionRequest],
        context: Context,
    ) -> sessions_pb2.ImportSessionResponse:
        async with ending_with_status(context):
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("part") != "session":
                raise InvalidRequest("an import begins with the session")
            history = _history(first.session.history)
            head, written = await self._admin.begin(
                _name(first.session.name), history, _blobs(request_iterator, context)
            )
        return sessions_pb2.ImportSessionResponse(
            session=self._session(head),
            kept_blobs=written.kept_blobs,
            refused_blobs=written.refused_blobs,
        )

    def _session(self, head: SessionHead) -> sessions_pb2.Session:
        return sessions_pb2.Session(
            session_id=head.name.session_id,
            version=head.version,
            num_tokens=head.num_tokens,
            created_unix_seconds=head.created_s,
            last_used_unix_seconds=head.last_used_s,
            pinned_until_unix_seconds=head.pinned_until_s,
            worker=head.worker,
            in_turn=self._admin.is_in_use(head.name),
        )


def sessions_service(service: SessionsService) -> rpc.Service:
    return rpc.Service(
        "model1.v1.Sessions",
        partial(sessions_pb2_grpc.add_SessionsServicer_to_server, service),
    )


def _name(message: sessions_pb2.SessionName) -> SessionName:
    return SessionName(message.session_id, message.cache_salt)


def _history(message: sessions_pb2.SessionHistory) -> History:
    token_ids = tuple(message.token_ids)
    if message.checksum != _checksum(token_ids, message.kv_root):
        raise InvalidRequest("the history is damaged: its checksum is another one")
    return History(token_ids, message.kv_root, message.created_unix_seconds)


def _checksum(token_ids: tuple[int, ...], kv_root: bytes) -> bytes:
    return xxhash.xxh3_128_digest(packed(token_ids) + kv_root)


async def _blobs(
    requests: AsyncIterator[sessions_pb2.ImportSessionRequest], context: Context
) -> AsyncIterator[kvstore_pb2.BlobPart]:
    await context.send_initial_metadata((IMPORT_ACCEPTED,))
    async for request in requests:
        if request.WhichOneof("part") != "blob":
            raise InvalidRequest("after the session there are parts of blobs only")
        yield request.blob


def _residence_to_wire(residence: Residence) -> sessions_pb2.SessionKv:
    by_tier = residence.by_tier
    return sessions_pb2.SessionKv(
        ram_tokens=by_tier[Tier.RAM],
        disk_tokens=by_tier[Tier.DISK],
        peer_tokens=by_tier[Tier.PEER],
        cold_tokens=by_tier[Tier.COLD],
        missing_tokens=residence.missing,
    )
