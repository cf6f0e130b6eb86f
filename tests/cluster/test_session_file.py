"""Exported sessions on disk."""

import stat
from pathlib import Path

import pytest

from cluster.session_file import MAGIC, SessionFileError, new_session_file, read_session
from protos import kvstore_pb2, sessions_pb2

PARTS = [
    sessions_pb2.ExportSessionResponse(history=sessions_pb2.SessionHistory(token_ids=[5, 6])),
    *(
        sessions_pb2.ExportSessionResponse(
            blob=kvstore_pb2.BlobPart(total_bytes=1000, data=bytes([i]) * 1000)
        )
        for i in range(3)
    ),
]


def write(path: Path, parts: list[sessions_pb2.ExportSessionResponse] = PARTS) -> Path:
    with new_session_file(path) as put:
        for part in parts:
            put(part)
    return path


def test_what_was_written_is_read_by_its_owner(tmp_path: Path) -> None:
    path = write(tmp_path / "tea")
    assert list(read_session(path)) == PARTS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "tea")
    with pytest.raises(SessionFileError, match=r"tea is there already"):
        write(path)
    assert list(read_session(path)) == PARTS


def test_what_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_session_file(tmp_path / "tea") as put:
        put(PARTS[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionFileError, match=r"gone/tea: No such file"):
        write(tmp_path / "gone" / "tea")
    with pytest.raises(SessionFileError, match=r"gone/tea: No such file"):
        list(read_session(tmp_path / "gone" / "tea"))


def test_a_file_that_was_cut_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "tea")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SessionFileError, match="tea is damaged"):
        list(read_session(path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file of something else", MAGIC])
def test_another_file_is_no_session(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tea"
    path.write_bytes(content)
    with pytest.raises(
        SessionFileError, match=r"tea (is not an exported session|holds no history)"
    ):
        list(read_session(path))
