"""The tensors of a checkpoint directory by their shipped names, read through memory maps.

Opens a file when a tensor of it is first asked for, so a role touches only the files and only
the bytes that it needs. Does not know which tensors a model should have.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model1.checkpoint.directory import tensor_files
from model1.checkpoint.names import is_draft, is_quantisation_scale, shipped_name
from model1.errors import CheckpointError

# safetensors' names of the types that an unquantised checkpoint is made of
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTEGERS = {"I64", "I32"}  # of tables of ids


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, rows: slice) -> Tensor: ...


class _OpenFile(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    stored_name: str


class CheckpointTensors(AbstractContextManager["CheckpointTensors"]):
    """Open for the length of a `with`; tensors read are copies and outlive it."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.unexpected: list[str] = []  # stored names that are no tensor of this architecture
        self.repeated: list[str] = []  # shipped names stored more than once
        self.bytes_read = 0
        self._opened: dict[Path, _OpenFile] = {}
        self._exits = ExitStack()
        self._places: dict[str, _Place] = {}
        for path, names in tensor_files(directory).items():
            for stored in sorted(names if names is not None else self._file(path).keys()):
                self._register(path, stored)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.close()

    def __enter__(self) -> Self:
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> Iterator[str]:
        return iter(self._places)

    def open_files_of(self, names: Iterable[str]) -> None:
        for name in names:
            self._file(self._places[name].path)

    def opened_names(self) -> Iterator[str]:
        """The tensors whose shape costs nothing to ask, because their file is open anyway."""
        return (name for name, place in self._places.items() if place.path in self._opened)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def refuse_quantised(self, name: str) -> None:
        """The seam where quantised weights will come in: today they are an error."""
        plain = _INTEGERS if name.endswith(".tid2eid") else _FLOATS
        dtype = self._slice(name).get_dtype()
        if dtype not in plain:
            place = self._places[name]
            raise _quantised(place.path, f"{place.stored_name} ({dtype})")

    def stored_name(self, name: str) -> str:
        return self._places[name].stored_name

    def read_into(self, target: Tensor, name: str, row: int | None = None) -> None:
        """Copy the tensor, or only its entry `row` of dimension 0, into `target` of its shape."""
        rows = slice(None) if row is None else slice(row, row + 1)
        mapped = self._slice(name)[rows]
        self.bytes_read += mapped.nbytes
        with torch.no_grad():
            target.copy_(mapped if row is None else mapped[0])

    def _register(self, path: Path, stored: str) -> None:
        if is_draft(stored):
            return
        name = shipped_name(stored)
        if is_quantisation_scale(stored):
            raise _quantised(path, stored)
        if name is None:
            self.unexpected.append(stored)
        elif name in self._places:
            self.repeated.append(name)
        else:
            self._places[name] = _Place(path, stored)

    def _slice(self, name: str) -> _Slice:
        place = self._places[name]
        try:
            return self._file(place.path).get_slice(place.stored_name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{place.path} has no {place.stored_name}, though the index says so"
            ) from error

    def _file(self, path: Path) -> _OpenFile:
        if path not in self._opened:
            try:
                opened = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError as error:
                raise CheckpointError(f"{path.parent} has no {path.name}") from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
            self._opened[path] = cast(_OpenFile, self._exits.enter_context(opened))
        return self._opened[path]


def _quantised(path: Path, stored: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds a quantised tensor, {stored}: quantised checkpoints are not supported yet"
    )
