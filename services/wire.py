"""Owns the translation between dispatch messages and numpy arrays; proto messages stop here.

Knows no stream, no routing and no torch. A bfloat16 tensor is an array of its raw uint16 words, a
float32 tensor an array of float32; nothing else travels. Whatever arrives is checked against the
shape it claims before an array is made of it, and what crosses between nodes against a checksum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import xxhash
from numpy.typing import NDArray

from protos import expert_pb2, router_pb2, tensor_pb2
from services import errors

Words = NDArray[np.uint16] | NDArray[np.float32]

BFLOAT16_WORD = np.dtype("<u2")
FLOAT32_WORD = np.dtype("<f4")
_INDEX = np.dtype("<i4")
_WORD_OF: dict[int, np.dtype[Any]] = {
    tensor_pb2.DTYPE_BFLOAT16: BFLOAT16_WORD,
    tensor_pb2.DTYPE_FLOAT32: FLOAT32_WORD,
}
_DTYPE_OF = {word: dtype for dtype, word in _WORD_OF.items()}


class MalformedCall(ValueError):
    """A message whose fields contradict each other or the model; a bug of its sender."""


class DamagedCall(MalformedCall):
    """A message whose bytes are not those that were sent. Sent again it may be whole."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerRows:
    """One layer crossing, as the worker asks for it."""

    layer: int
    rows: Words  # [T, D]
    expert_ids: NDArray[np.int32]  # [T, k]
    weights: NDArray[np.float32]  # [T, k]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """The part of a layer crossing that one replica computes: P pairs over N rows."""

    layer: int
    rows: Words  # [N, D]
    row_index: NDArray[np.int32]  # [P]
    expert_ids: NDArray[np.int32]  # [P]
    weights: NDArray[np.float32]  # [P]


def encode_layer_rows(
    call_id: int, call: LayerRows, timeout_seconds: float | None
) -> router_pb2.LayerRows:
    num_rows, hidden_size = call.rows.shape
    return router_pb2.LayerRows(
        call_id=call_id,
        layer=call.layer,
        dtype=_dtype_of(call.rows),
        num_rows=num_rows,
        hidden_size=hidden_size,
        experts_per_row=call.expert_ids.shape[1],
        rows=call.rows.tobytes(),
        expert_ids=call.expert_ids.tobytes(),
        weights=call.weights.tobytes(),
        timeout_seconds=timeout_seconds or 0.0,
    )


def decode_layer_rows(message: router_pb2.LayerRows) -> LayerRows:
    if not message.timeout_seconds >= 0:  # NaN would disorder the timers of the whole loop
        raise MalformedCall(f"timeout_seconds is {message.timeout_seconds}")
    pairs_shape = (message.num_rows, message.experts_per_row)
    return LayerRows(
        layer=message.layer,
        rows=_words("rows", message.rows, message.dtype, message.num_rows, message.hidden_size),
        expert_ids=_array("expert_ids", message.expert_ids, _INDEX, *pairs_shape),
        weights=_array("weights", message.weights, FLOAT32_WORD, *pairs_shape),
    )


def encode_expert_rows(
    call_id: int, call: ExpertRows, deadline_seconds: float | None
) -> expert_pb2.ExpertRows:
    num_rows, hidden_size = call.rows.shape
    tensors = (
        call.rows.tobytes(),
        call.row_index.tobytes(),
        call.expert_ids.tobytes(),
        call.weights.tobytes(),
    )
    rows, row_index, expert_ids, weights = tensors
    return expert_pb2.ExpertRows(
        call_id=call_id,
        layer=call.layer,
        dtype=_dtype_of(call.rows),
        num_rows=num_rows,
        hidden_size=hidden_size,
        num_pairs=len(call.row_index),
        rows=rows,
        row_index=row_index,
        expert_ids=expert_ids,
        weights=weights,
        deadline_seconds=deadline_seconds or 0.0,
        checksum=_checksum(*tensors),
    )


def decode_expert_rows(message: expert_pb2.ExpertRows) -> ExpertRows:
    tensors = rows, row_index, expert_ids, weights = (
        message.rows,
        message.row_index,
        message.expert_ids,
        message.weights,
    )
    call = ExpertRows(
        layer=message.layer,
        rows=_words("rows", rows, message.dtype, message.num_rows, message.hidden_size),
        row_index=_array("row_index", row_index, _INDEX, message.num_pairs),
        expert_ids=_array("expert_ids", expert_ids, _INDEX, message.num_pairs),
        weights=_array("weights", weights, FLOAT32_WORD, message.num_pairs),
    )
    _verify("the call", message.checksum, *tensors)
    if (stray := first_outside(call.row_index, message.num_rows)) is not None:
        raise MalformedCall(f"row_index holds {stray}, there are {message.num_rows} rows")
    return call


def encode_expert_outputs(call_id: int, pair_rows: Words) -> expert_pb2.ExpertOutputs:
    data = pair_rows.tobytes()
    return expert_pb2.ExpertOutputs(call_id=call_id, pair_rows=data, checksum=_checksum(data))


def decode_pair_rows(
    message: expert_pb2.ExpertOutputs, word: np.dtype[Any], num_pairs: int, hidden_size: int
) -> Words:
    data = message.pair_rows
    pair_rows = _array("pair_rows", data, word, num_pairs, hidden_size)
    _verify("pair_rows", message.checksum, data)
    return pair_rows


def encode_layer_sums(call_id: int, sums: NDArray[np.float32]) -> router_pb2.LayerSums:
    return router_pb2.LayerSums(call_id=call_id, sums=sums.tobytes())


def decode_sums(
    message: router_pb2.LayerSums, num_rows: int, hidden_size: int
) -> NDArray[np.float32]:
    return _array("sums", message.sums, FLOAT32_WORD, num_rows, hidden_size)


def encode_error(error: Exception) -> tensor_pb2.CallError:
    """What a call of a dispatch stream answers instead of rows."""
    if isinstance(error, DamagedCall):
        status = grpc.StatusCode.DATA_LOSS
    elif isinstance(error, MalformedCall):
        status = grpc.StatusCode.INVALID_ARGUMENT
    else:
        status = errors.STATUS.get(type(error), grpc.StatusCode.INTERNAL)
    return tensor_pb2.CallError(code=status.value[0], message=str(error))


# An INVALID_ARGUMENT is absent on purpose: a malformed call is our bug, never the client's.
_RAISED_FOR: dict[int, type[Exception]] = {
    errors.STATUS[raised].value[0]: raised
    for raised in (
        errors.ExpertsUnavailable,
        errors.QueueFull,
        errors.DeadlineExceeded,
        errors.ModelMismatch,
    )
}


def decode_error(error: tensor_pb2.CallError) -> Exception:
    return _RAISED_FOR.get(error.code, errors.InternalFailure)(error.message)


def first_outside(indices: NDArray[np.int32], end: int) -> int | None:
    """The first index that is not in [0, end)."""
    # As unsigned, a negative index is a huge one: one pass for both bounds.
    if not indices.size or indices.view(np.uint32).max() < end:
        return None
    strays = indices[(indices < 0) | (indices >= end)]
    return int(strays[0])


def _checksum(*tensors: bytes) -> int:
    state = xxhash.xxh3_64()
    for tensor in tensors:
        state.update(tensor)
    return state.intdigest()


def _verify(name: str, expected: int, *tensors: bytes) -> None:
    if (checksum := _checksum(*tensors)) != expected:
        raise DamagedCall(f"checksum of {name} is {checksum:016x}, sent was {expected:016x}")


def _dtype_of(rows: Words) -> tensor_pb2.DType:
    return _DTYPE_OF[rows.dtype]  # type: ignore[return-value]


def _words(name: str, data: bytes, dtype: int, *shape: int) -> Words:
    if dtype not in _WORD_OF:
        raise MalformedCall(f"dtype {dtype} of {name} is neither float32 nor bfloat16")
    return _array(name, data, _WORD_OF[dtype], *shape)


def _array(name: str, data: bytes, word: np.dtype[Any], *shape: int) -> NDArray[Any]:
    """A read-only view of `data`; the array keeps it alive."""
    expected_bytes = math.prod(shape) * word.itemsize
    if len(data) != expected_bytes:
        raise MalformedCall(
            f"{name} of shape {list(shape)} needs {expected_bytes} bytes, got {len(data)}"
        )
    return np.frombuffer(data, dtype=word).reshape(shape)
