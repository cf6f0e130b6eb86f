"""A KV store as far as sessions are concerned: a real server over a real table."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services import rpc
from services.gateway.store import StoreAddress
from services.kvstore.session_service import ColdRecords, SessionStoreService, session_service
from services.kvstore.sessions import SessionTable


@asynccontextmanager
async def session_store(
    name: str, directory: Path | None = None, cold: ColdRecords | None = None
) -> AsyncIterator[StoreAddress]:
    table = SessionTable(directory)
    service = SessionStoreService(table, cold)
    server = await rpc.start_server([session_service(service)], "127.0.0.1:0")
    try:
        yield StoreAddress(name, server.address)
    finally:
        await server.stop(0)
        await service.close()
        table.close()
