"""A session as a file: what `Sessions.Export` sent, one message after the other.

Knows the framing alone. Blobs in it check themselves when they are taken in, and so does the
history, without which there is nothing to take in.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf import proto
from google.protobuf.message import DecodeError

from protos import sessions_pb2

MAGIC = b"model1 session 1\n"
PRIVATE = 0o600


class SessionFileError(Exception):
    """The file cannot be written, or does not hold a session; the message names it."""


@contextmanager
def new_session_file(
    path: Path,
) -> Iterator[Callable[[sessions_pb2.ExportSessionResponse], None]]:
    """Give it one part after the other. The file is there only once it is whole, that is when the
    context was left without an error, and only its owner may read it."""
    if path.exists():
        raise SessionFileError(f"{path} is there already")
    unfinished = path.with_name(path.name + ".partial")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE)
        try:
            file: Any  # of protobuf's types a BytesIO, of its documentation any buffered output
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC)
                yield lambda part: proto.serialize_length_prefixed(part, file)
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SessionFileError(f"cannot write {path}: {error.strerror}") from error


def read_session(path: Path) -> Iterator[sessions_pb2.ExportSessionResponse]:
    """The history first, then the parts of its blobs."""
    file: Any
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise SessionFileError(f"{path} is not an exported session")
            parse = partial(proto.parse_length_prefixed, sessions_pb2.ExportSessionResponse, file)
            first = parse()
            if first is None or first.WhichOneof("part") != "history":
                raise SessionFileError(f"{path} holds no history")
            yield first
            while (part := parse()) is not None:
                yield part
    except (DecodeError, ValueError) as error:
        raise SessionFileError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise SessionFileError(f"cannot read {path}: {error.strerror}") from error
