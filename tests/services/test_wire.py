from dataclasses import replace

import grpc
import numpy as np
import pytest

from model1.errors import ConfigError
from protos import expert_pb2, router_pb2
from services import errors, wire
from services.wire import DamagedCall, ExpertRows, LayerRows, MalformedCall


def _layer_rows(dtype: type = np.float32) -> LayerRows:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((3, 4)).astype(np.float32)
    return LayerRows(
        layer=5,
        rows=rows if dtype is np.float32 else rows.view(np.uint16)[:, ::2].copy(),
        expert_ids=np.array([[0, 2], [1, 2], [0, 7]], dtype=np.int32),
        weights=draw.random((3, 2), dtype=np.float32),
    )


def _expert_rows() -> ExpertRows:
    return ExpertRows(
        layer=1,
        rows=np.arange(8, dtype=np.float32).reshape(2, 4),
        row_index=np.array([0, 0, 1], dtype=np.int32),
        expert_ids=np.array([3, 4, 3], dtype=np.int32),
        weights=np.array([0.25, 0.5, 1.0], dtype=np.float32),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_layer_rows_come_back_as_they_were(dtype: type) -> None:
    sent = _layer_rows(dtype)
    message = wire.encode_layer_rows(9, sent, timeout_seconds=1.5)
    got = wire.decode_layer_rows(router_pb2.LayerRows.FromString(message.SerializeToString()))
    assert (message.call_id, message.timeout_seconds, got.layer) == (9, 1.5, 5)
    for name in ("rows", "expert_ids", "weights"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name), strict=True)


def test_expert_rows_come_back_as_they_were() -> None:
    sent = _expert_rows()
    message = wire.encode_expert_rows(9, sent, deadline_seconds=None)
    got = wire.decode_expert_rows(expert_pb2.ExpertRows.FromString(message.SerializeToString()))
    assert (message.deadline_seconds, got.layer) == (0.0, 1)
    for name in ("rows", "row_index", "expert_ids", "weights"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name), strict=True)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rows", b"123", r"rows of shape \[3, 4\] needs 48 bytes, got 3"),
        ("num_rows", 2, r"expert_ids|rows"),
        ("hidden_size", 5, r"rows of shape \[3, 5\] needs 60 bytes, got 48"),
        ("experts_per_row", 3, r"expert_ids of shape \[3, 3\] needs 36 bytes, got 24"),
        ("weights", b"", r"weights of shape \[3, 2\] needs 24 bytes, got 0"),
        ("dtype", 0, "dtype 0 of rows"),
        ("dtype", 77, "dtype 77 of rows"),
        ("dtype", 2, "needs 24 bytes, got 48"),
        ("timeout_seconds", float("nan"), "timeout_seconds is nan"),
        ("timeout_seconds", -1.0, "timeout_seconds is -1.0"),
    ],
)
def test_layer_rows_that_contradict_themselves_are_refused(
    field: str, value: float | bytes, words: str
) -> None:
    message = wire.encode_layer_rows(1, _layer_rows(), None)
    setattr(message, field, value)
    with pytest.raises(MalformedCall, match=words):
        wire.decode_layer_rows(message)


@pytest.mark.parametrize("row_index", [[0, 1, 2], [-1, 0, 1]])
def test_a_row_index_outside_of_the_rows_is_refused(row_index: list[int]) -> None:
    call = replace(_expert_rows(), row_index=np.array(row_index, dtype=np.int32))
    message = wire.encode_expert_rows(1, call, None)
    with pytest.raises(MalformedCall, match="there are 2 rows"):
        wire.decode_expert_rows(message)


@pytest.mark.parametrize("field", ["rows", "row_index", "expert_ids", "weights"])
def test_a_call_with_one_bit_flipped_is_refused(field: str) -> None:
    message = wire.encode_expert_rows(1, _expert_rows(), None)
    setattr(message, field, _with_a_bit_flipped(getattr(message, field)))
    with pytest.raises(DamagedCall, match=r"checksum of the call is [0-9a-f]{16}, sent was"):
        wire.decode_expert_rows(message)


def test_an_answer_comes_back_as_it_was_or_is_refused() -> None:
    rows = _expert_rows().rows
    message = wire.encode_expert_outputs(1, rows)
    got = wire.decode_pair_rows(message, wire.FLOAT32_WORD, *rows.shape)
    np.testing.assert_array_equal(got, rows, strict=True)
    message.pair_rows = _with_a_bit_flipped(message.pair_rows)
    with pytest.raises(DamagedCall, match="checksum of pair_rows"):
        wire.decode_pair_rows(message, wire.FLOAT32_WORD, *rows.shape)


def _with_a_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (errors.ExpertsUnavailable("x"), grpc.StatusCode.UNAVAILABLE, errors.ExpertsUnavailable),
        (errors.QueueFull("x"), grpc.StatusCode.RESOURCE_EXHAUSTED, errors.QueueFull),
        (
            errors.DeadlineExceeded("x"),
            grpc.StatusCode.DEADLINE_EXCEEDED,
            errors.DeadlineExceeded,
        ),
        (errors.ModelMismatch("x"), grpc.StatusCode.FAILED_PRECONDITION, errors.ModelMismatch),
        (DamagedCall("x"), grpc.StatusCode.DATA_LOSS, errors.InternalFailure),
        (MalformedCall("x"), grpc.StatusCode.INVALID_ARGUMENT, errors.InternalFailure),
        (errors.InternalFailure("x"), grpc.StatusCode.INTERNAL, errors.InternalFailure),
        (ConfigError("x"), grpc.StatusCode.FAILED_PRECONDITION, errors.ModelMismatch),
        (ZeroDivisionError("x"), grpc.StatusCode.INTERNAL, errors.InternalFailure),
    ],
)
def test_an_error_crosses_the_wire_with_its_status_and_words(
    error: Exception, status: grpc.StatusCode, raised: type[Exception]
) -> None:
    sent = wire.encode_error(error)
    assert (sent.code, sent.message) == (status.value[0], "x")
    got = wire.decode_error(sent)
    assert (type(got), str(got)) == (raised, "x")
