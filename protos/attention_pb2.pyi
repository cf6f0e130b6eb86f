from protos import histogram_pb2 as _histogram_pb2
from protos import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttentionGenerateRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "temperature", "top_p", "top_k", "seed", "max_tokens", "stop_token_ids", "cache_salt", "session_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_salt: str
    session_id: str
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., cache_salt: _Optional[str] = ..., session_id: _Optional[str] = ...) -> None: ...

class AttentionGenerateResponse(_message.Message):
    __slots__ = ("accepted", "tokens", "final")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    accepted: AttentionAccepted
    tokens: AttentionTokens
    final: AttentionFinal
    def __init__(self, accepted: _Optional[_Union[AttentionAccepted, _Mapping]] = ..., tokens: _Optional[_Union[AttentionTokens, _Mapping]] = ..., final: _Optional[_Union[AttentionFinal, _Mapping]] = ...) -> None: ...

class AttentionAccepted(_message.Message):
    __slots__ = ("kv_root",)
    KV_ROOT_FIELD_NUMBER: _ClassVar[int]
    kv_root: bytes
    def __init__(self, kv_root: _Optional[bytes] = ...) -> None: ...

class AttentionTokens(_message.Message):
    __slots__ = ("token_ids", "kv")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    kv: _inference_pb2.KvUsage
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., kv: _Optional[_Union[_inference_pb2.KvUsage, _Mapping]] = ...) -> None: ...

class AttentionFinal(_message.Message):
    __slots__ = ("finish_reason",)
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _inference_pb2.FinishReason
    def __init__(self, finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ...) -> None: ...

class AttentionAbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AttentionAbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttentionStatsRequest(_message.Message):
    __slots__ = ("crossing_rows",)
    CROSSING_ROWS_FIELD_NUMBER: _ClassVar[int]
    crossing_rows: int
    def __init__(self, crossing_rows: _Optional[int] = ...) -> None: ...

class AttentionStatsResponse(_message.Message):
    __slots__ = ("worker", "draining", "waiting_sequences", "running_sequences", "accepted_requests", "finished_requests", "cancelled_requests", "failed_requests", "steps", "prompt_tokens", "completion_tokens", "largest_batch_tokens", "layer_crossings", "crossing_seconds_p50", "crossing_seconds_p99", "crossing_wait_seconds_p50", "crossing_wait_seconds_p99", "kv", "crossing_seconds", "crossing_wait_seconds", "queue_seconds", "first_token_seconds", "step_seconds", "filled_seconds", "oldest_waiting_seconds", "overlapped_steps", "overlap")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYER_CROSSINGS_FIELD_NUMBER: _ClassVar[int]
    CROSSING_SECONDS_P50_FIELD_NUMBER: _ClassVar[int]
    CROSSING_SECONDS_P99_FIELD_NUMBER: _ClassVar[int]
    CROSSING_WAIT_SECONDS_P50_FIELD_NUMBER: _ClassVar[int]
    CROSSING_WAIT_SECONDS_P99_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    CROSSING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CROSSING_WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FILLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OVERLAPPED_STEPS_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    worker: str
    draining: bool
    waiting_sequences: int
    running_sequences: int
    accepted_requests: int
    finished_requests: int
    cancelled_requests: int
    failed_requests: int
    steps: int
    prompt_tokens: int
    completion_tokens: int
    largest_batch_tokens: int
    layer_crossings: int
    crossing_seconds_p50: float
    crossing_seconds_p99: float
    crossing_wait_seconds_p50: float
    crossing_wait_seconds_p99: float
    kv: AttentionKvStats
    crossing_seconds: _histogram_pb2.Histogram
    crossing_wait_seconds: _histogram_pb2.Histogram
    queue_seconds: _histogram_pb2.Histogram
    first_token_seconds: _histogram_pb2.Histogram
    step_seconds: _histogram_pb2.Histogram
    filled_seconds: float
    oldest_waiting_seconds: float
    overlapped_steps: int
    overlap: _containers.RepeatedCompositeFieldContainer[AttentionOverlap]
    def __init__(self, worker: _Optional[str] = ..., draining: _Optional[bool] = ..., waiting_sequences: _Optional[int] = ..., running_sequences: _Optional[int] = ..., accepted_requests: _Optional[int] = ..., finished_requests: _Optional[int] = ..., cancelled_requests: _Optional[int] = ..., failed_requests: _Optional[int] = ..., steps: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., largest_batch_tokens: _Optional[int] = ..., layer_crossings: _Optional[int] = ..., crossing_seconds_p50: _Optional[float] = ..., crossing_seconds_p99: _Optional[float] = ..., crossing_wait_seconds_p50: _Optional[float] = ..., crossing_wait_seconds_p99: _Optional[float] = ..., kv: _Optional[_Union[AttentionKvStats, _Mapping]] = ..., crossing_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., crossing_wait_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., queue_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., first_token_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., step_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., filled_seconds: _Optional[float] = ..., oldest_waiting_seconds: _Optional[float] = ..., overlapped_steps: _Optional[int] = ..., overlap: _Optional[_Iterable[_Union[AttentionOverlap, _Mapping]]] = ...) -> None: ...

class AttentionOverlap(_message.Message):
    __slots__ = ("max_tokens", "has_prompts", "micro_batches", "ratio", "wait_share")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HAS_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    WAIT_SHARE_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    has_prompts: bool
    micro_batches: int
    ratio: float
    wait_share: float
    def __init__(self, max_tokens: _Optional[int] = ..., has_prompts: _Optional[bool] = ..., micro_batches: _Optional[int] = ..., ratio: _Optional[float] = ..., wait_share: _Optional[float] = ...) -> None: ...

class AttentionKvStats(_message.Message):
    __slots__ = ("asked_tokens", "hit", "restored", "computed_tokens", "skipped_tokens", "failed_tokens", "late_tokens", "saved_blobs", "dropped_blobs", "held_blocks", "cached_blocks", "max_blocks", "pool_bytes", "waiting_blobs")
    ASKED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIT_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LATE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAVED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_BLOBS_FIELD_NUMBER: _ClassVar[int]
    asked_tokens: int
    hit: AttentionTierTokens
    restored: AttentionTierTokens
    computed_tokens: int
    skipped_tokens: int
    failed_tokens: int
    late_tokens: int
    saved_blobs: int
    dropped_blobs: int
    held_blocks: int
    cached_blocks: int
    max_blocks: int
    pool_bytes: int
    waiting_blobs: int
    def __init__(self, asked_tokens: _Optional[int] = ..., hit: _Optional[_Union[AttentionTierTokens, _Mapping]] = ..., restored: _Optional[_Union[AttentionTierTokens, _Mapping]] = ..., computed_tokens: _Optional[int] = ..., skipped_tokens: _Optional[int] = ..., failed_tokens: _Optional[int] = ..., late_tokens: _Optional[int] = ..., saved_blobs: _Optional[int] = ..., dropped_blobs: _Optional[int] = ..., held_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., max_blocks: _Optional[int] = ..., pool_bytes: _Optional[int] = ..., waiting_blobs: _Optional[int] = ...) -> None: ...

class AttentionTierTokens(_message.Message):
    __slots__ = ("device", "ram", "disk", "peer", "cold")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RAM_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    COLD_FIELD_NUMBER: _ClassVar[int]
    device: int
    ram: int
    disk: int
    peer: int
    cold: int
    def __init__(self, device: _Optional[int] = ..., ram: _Optional[int] = ..., disk: _Optional[int] = ..., peer: _Optional[int] = ..., cold: _Optional[int] = ...) -> None: ...

class AttentionDrainRequest(_message.Message):
    __slots__ = ("grace_seconds",)
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grace_seconds: float
    def __init__(self, grace_seconds: _Optional[float] = ...) -> None: ...

class AttentionDrainResponse(_message.Message):
    __slots__ = ("aborted_requests",)
    ABORTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    aborted_requests: int
    def __init__(self, aborted_requests: _Optional[int] = ...) -> None: ...

class AttentionReleaseRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AttentionReleaseResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...
