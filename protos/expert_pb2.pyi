from protos import histogram_pb2 as _histogram_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertRows(_message.Message):
    __slots__ = ("call_id", "layer", "dtype", "num_rows", "hidden_size", "num_pairs", "rows", "row_index", "expert_ids", "weights", "deadline_seconds", "checksum")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAIRS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_INDEX_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    layer: int
    dtype: _tensor_pb2.DType
    num_rows: int
    hidden_size: int
    num_pairs: int
    rows: bytes
    row_index: bytes
    expert_ids: bytes
    weights: bytes
    deadline_seconds: float
    checksum: int
    def __init__(self, call_id: _Optional[int] = ..., layer: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., num_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., num_pairs: _Optional[int] = ..., rows: _Optional[bytes] = ..., row_index: _Optional[bytes] = ..., expert_ids: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., deadline_seconds: _Optional[float] = ..., checksum: _Optional[int] = ...) -> None: ...

class ExpertOutputs(_message.Message):
    __slots__ = ("call_id", "pair_rows", "error", "checksum")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    PAIR_ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    pair_rows: bytes
    error: _tensor_pb2.CallError
    checksum: int
    def __init__(self, call_id: _Optional[int] = ..., pair_rows: _Optional[bytes] = ..., error: _Optional[_Union[_tensor_pb2.CallError, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class ExpertStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertStatsResponse(_message.Message):
    __slots__ = ("replica", "expert_ids", "draining", "calls", "rows", "pairs", "failed_calls", "late_calls", "busy_seconds", "compute_seconds")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    FAILED_CALLS_FIELD_NUMBER: _ClassVar[int]
    LATE_CALLS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    draining: bool
    calls: int
    rows: int
    pairs: int
    failed_calls: int
    late_calls: int
    busy_seconds: float
    compute_seconds: _histogram_pb2.Histogram
    def __init__(self, replica: _Optional[str] = ..., expert_ids: _Optional[_Iterable[int]] = ..., draining: _Optional[bool] = ..., calls: _Optional[int] = ..., rows: _Optional[int] = ..., pairs: _Optional[int] = ..., failed_calls: _Optional[int] = ..., late_calls: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., compute_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ...) -> None: ...
