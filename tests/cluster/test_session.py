"""What `model1 session` tells when a file or a gateway does not want to."""

from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.access import Access
from cluster.client import RequestFailed
from cluster.session import SessionCommand
from cluster.session_file import SessionFileError, new_session_file
from protos import kvstore_pb2, sessions_pb2, sessions_pb2_grpc
from services import rpc
from services.session_record import IMPORT_ACCEPTED

BLOB = kvstore_pb2.BlobPart(total_bytes=2**20, data=bytes(2**20))


class _Gateway(sessions_pb2_grpc.SessionsServicer):
    """Takes an import in; one of the name `taken` is refused after its first part."""

    async def Import(self, requests: Any, context: Any) -> sessions_pb2.ImportSessionResponse:
        num_blobs = 0
        async for request in requests:
            if request.session.name.session_id == "taken":
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is one")
            if request.HasField("session"):
                await context.send_initial_metadata((IMPORT_ACCEPTED,))
            num_blobs += request.HasField("blob")
        return sessions_pb2.ImportSessionResponse(kept_blobs=num_blobs)


async def import_from(file: Path, name: str = "tea") -> None:
    register = partial(sessions_pb2_grpc.add_SessionsServicer_to_server, _Gateway())
    service = rpc.Service("model1.v1.Sessions", register)
    async with await rpc.start_server([service], "127.0.0.1:0") as server:
        command = SessionCommand(access=Access(server.address), cache_salt="", as_json=False)
        await command.import_from(name, file)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    file = tmp_path / "exported"
    with new_session_file(file) as write:
        history = sessions_pb2.SessionHistory(token_ids=[5, 6])
        write(sessions_pb2.ExportSessionResponse(history=history))
        for _ in range(8):
            write(sessions_pb2.ExportSessionResponse(blob=BLOB))
    return file


@pytest.fixture
def cut(exported: Path) -> Path:
    exported.write_bytes(exported.read_bytes()[:-10])
    return exported


async def test_every_part_of_a_file_arrives(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await import_from(exported)
    assert "8 blobs taken in" in capsys.readouterr().out


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionFileError, match=r"gone: No such file"):
        await import_from(tmp_path / "gone")


async def test_a_file_that_was_cut_is_named_though_its_first_parts_were_sent(cut: Path) -> None:
    with pytest.raises(SessionFileError, match="exported is damaged"):
        await import_from(cut)


async def test_a_refusal_before_the_last_part_is_told(exported: Path) -> None:
    with pytest.raises(RequestFailed, match="ALREADY_EXISTS: there is one"):
        await import_from(exported, "taken")
