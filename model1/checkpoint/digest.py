"""Which model a directory holds, in 16 bytes: what KV state and sessions of it are filed under.

Reading every weight would take minutes for a large model, so contents are sampled: any change that
touches whole tensors (training, quantising, merging) is seen, a flipped bit is not. How tensors are
spread over files does not matter. Imports no torch.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model1.checkpoint.directory import load_config, tensor_files
from model1.errors import CheckpointError

_PIECES = 8  # of a tensor, evenly spread, the first and the last bytes among them
_PIECE_BYTES = 256
_LENGTH_BYTES = 8  # of a safetensors file: of the JSON header's length, little-endian
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor's name, dtype and shape, and a digest of what was read of its bytes."""

    name: str
    header: str
    sample: bytes


def checkpoint_digest(directory: str | Path) -> bytes:
    """16 bytes that tell models apart: config, and each tensor's name, dtype, shape and samples.

    NOTE: of a shard that is not there (another role's) only the names count, so two machines with
    other parts of one checkpoint disagree, and experts that neither has are not compared.
    Raises `CheckpointError` or `ConfigError`.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, json.dumps(load_config(directory).to_dict(), sort_keys=True).encode())
    stored: list[_Stored] = []
    for path, names in tensor_files(directory).items():
        if path.exists():
            stored += _tensors_of(path)
        else:
            stored += [_Stored(name, "absent", b"") for name in names or ()]
    for tensor in sorted(stored, key=lambda tensor: tensor.name):
        for part in (tensor.name.encode(), tensor.header.encode(), tensor.sample):
            _add(digest, part)
    return digest.digest()


def _add(digest: "hashlib.blake2b", part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def _tensors_of(path: Path) -> Iterator[_Stored]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
            start = _LENGTH_BYTES + header_bytes
            if header_bytes > _MAX_HEADER_BYTES or start > len(data):
                raise CheckpointError(f"{path} is damaged: its header is longer than the file")
            header = json.loads(data[_LENGTH_BYTES:start])
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (start + offset for offset in entry["data_offsets"])
                if not start <= begin <= end <= len(data):
                    raise CheckpointError(f"{path} is damaged: {name} lies outside of the file")
                what = json.dumps([entry["dtype"], entry["shape"]])
                yield _Stored(name, what, _sample(data, begin, end))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # empty, or no such header
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _sample(data: mmap.mmap, begin: int, end: int) -> bytes:
    if end - begin <= _PIECES * _PIECE_BYTES:
        return data[begin:end]
    last = end - _PIECE_BYTES
    starts = (begin + (last - begin) * i // (_PIECES - 1) for i in range(_PIECES))
    return b"".join(data[start : start + _PIECE_BYTES] for start in starts)
