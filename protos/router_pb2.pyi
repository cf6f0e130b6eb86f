from protos import histogram_pb2 as _histogram_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LayerRows(_message.Message):
    __slots__ = ("call_id", "cancel", "layer", "dtype", "num_rows", "hidden_size", "experts_per_row", "rows", "expert_ids", "weights", "timeout_seconds")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    cancel: bool
    layer: int
    dtype: _tensor_pb2.DType
    num_rows: int
    hidden_size: int
    experts_per_row: int
    rows: bytes
    expert_ids: bytes
    weights: bytes
    timeout_seconds: float
    def __init__(self, call_id: _Optional[int] = ..., cancel: _Optional[bool] = ..., layer: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., num_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., experts_per_row: _Optional[int] = ..., rows: _Optional[bytes] = ..., expert_ids: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class LayerSums(_message.Message):
    __slots__ = ("call_id", "sums", "error")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    sums: bytes
    error: _tensor_pb2.CallError
    def __init__(self, call_id: _Optional[int] = ..., sums: _Optional[bytes] = ..., error: _Optional[_Union[_tensor_pb2.CallError, _Mapping]] = ...) -> None: ...

class RouterStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RouterStatsResponse(_message.Message):
    __slots__ = ("router", "epoch", "calls", "rows", "failed_calls", "resent_parts", "calls_under_way", "replicas", "calls_waiting", "hedged_parts", "hedges_won", "probe_parts", "expert_pairs")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FAILED_CALLS_FIELD_NUMBER: _ClassVar[int]
    RESENT_PARTS_FIELD_NUMBER: _ClassVar[int]
    CALLS_UNDER_WAY_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CALLS_WAITING_FIELD_NUMBER: _ClassVar[int]
    HEDGED_PARTS_FIELD_NUMBER: _ClassVar[int]
    HEDGES_WON_FIELD_NUMBER: _ClassVar[int]
    PROBE_PARTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PAIRS_FIELD_NUMBER: _ClassVar[int]
    router: str
    epoch: int
    calls: int
    rows: int
    failed_calls: int
    resent_parts: int
    calls_under_way: int
    replicas: _containers.RepeatedCompositeFieldContainer[RouterReplicaStats]
    calls_waiting: int
    hedged_parts: int
    hedges_won: int
    probe_parts: int
    expert_pairs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, router: _Optional[str] = ..., epoch: _Optional[int] = ..., calls: _Optional[int] = ..., rows: _Optional[int] = ..., failed_calls: _Optional[int] = ..., resent_parts: _Optional[int] = ..., calls_under_way: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[RouterReplicaStats, _Mapping]]] = ..., calls_waiting: _Optional[int] = ..., hedged_parts: _Optional[int] = ..., hedges_won: _Optional[int] = ..., probe_parts: _Optional[int] = ..., expert_pairs: _Optional[_Iterable[int]] = ...) -> None: ...

class RouterReplicaStats(_message.Message):
    __slots__ = ("address", "connected", "calls", "pairs", "outstanding_pairs", "breaks", "suspect", "slowness", "wrong_answers", "answer_seconds", "overdue_calls")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_PAIRS_FIELD_NUMBER: _ClassVar[int]
    BREAKS_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    WRONG_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OVERDUE_CALLS_FIELD_NUMBER: _ClassVar[int]
    address: str
    connected: bool
    calls: int
    pairs: int
    outstanding_pairs: int
    breaks: int
    suspect: bool
    slowness: float
    wrong_answers: int
    answer_seconds: _histogram_pb2.Histogram
    overdue_calls: int
    def __init__(self, address: _Optional[str] = ..., connected: _Optional[bool] = ..., calls: _Optional[int] = ..., pairs: _Optional[int] = ..., outstanding_pairs: _Optional[int] = ..., breaks: _Optional[int] = ..., suspect: _Optional[bool] = ..., slowness: _Optional[float] = ..., wrong_answers: _Optional[int] = ..., answer_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., overdue_calls: _Optional[int] = ...) -> None: ...
