from protos import attention_pb2 as _attention_pb2
from protos import expert_pb2 as _expert_pb2
from protos import histogram_pb2 as _histogram_pb2
from protos import kvstore_pb2 as _kvstore_pb2
from protos import router_pb2 as _router_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertMoveKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPERT_MOVE_KIND_UNSPECIFIED: _ClassVar[ExpertMoveKind]
    EXPERT_MOVE_KIND_LOAD: _ClassVar[ExpertMoveKind]
    EXPERT_MOVE_KIND_DROP: _ClassVar[ExpertMoveKind]
EXPERT_MOVE_KIND_UNSPECIFIED: ExpertMoveKind
EXPERT_MOVE_KIND_LOAD: ExpertMoveKind
EXPERT_MOVE_KIND_DROP: ExpertMoveKind

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "uptime_seconds", "active_requests", "max_active_requests", "draining", "metrics_url")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    METRICS_URL_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_seconds: float
    active_requests: int
    max_active_requests: int
    draining: bool
    metrics_url: str
    def __init__(self, version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., active_requests: _Optional[int] = ..., max_active_requests: _Optional[int] = ..., draining: _Optional[bool] = ..., metrics_url: _Optional[str] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model_path", "vocab_size", "max_context_length", "default_max_tokens", "bos_token_id", "eos_token_ids", "num_hidden_layers", "n_routed_experts")
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_HIDDEN_LAYERS_FIELD_NUMBER: _ClassVar[int]
    N_ROUTED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    model_path: str
    vocab_size: int
    max_context_length: int
    default_max_tokens: int
    bos_token_id: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_hidden_layers: int
    n_routed_experts: int
    def __init__(self, model_path: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context_length: _Optional[int] = ..., default_max_tokens: _Optional[int] = ..., bos_token_id: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., num_hidden_layers: _Optional[int] = ..., n_routed_experts: _Optional[int] = ...) -> None: ...

class GetTopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Member(_message.Message):
    __slots__ = ("name", "role", "address", "pid", "node_id", "state", "requests", "expert_group", "restarts", "stats")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_GROUP_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    address: str
    pid: int
    node_id: str
    state: str
    requests: int
    expert_group: int
    restarts: int
    stats: RoleStats
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., state: _Optional[str] = ..., requests: _Optional[int] = ..., expert_group: _Optional[int] = ..., restarts: _Optional[int] = ..., stats: _Optional[_Union[RoleStats, _Mapping]] = ...) -> None: ...

class RoleStats(_message.Message):
    __slots__ = ("requests", "seconds", "gateway", "attention", "router", "expert")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    requests: int
    seconds: float
    gateway: GatewayStats
    attention: _attention_pb2.AttentionStatsResponse
    router: _router_pb2.RouterStatsResponse
    expert: _expert_pb2.ExpertStatsResponse
    def __init__(self, requests: _Optional[int] = ..., seconds: _Optional[float] = ..., gateway: _Optional[_Union[GatewayStats, _Mapping]] = ..., attention: _Optional[_Union[_attention_pb2.AttentionStatsResponse, _Mapping]] = ..., router: _Optional[_Union[_router_pb2.RouterStatsResponse, _Mapping]] = ..., expert: _Optional[_Union[_expert_pb2.ExpertStatsResponse, _Mapping]] = ...) -> None: ...

class GatewayStats(_message.Message):
    __slots__ = ("received_requests", "finished_requests", "cancelled_requests", "rejected_requests", "failed_requests", "active_requests", "max_active_requests", "generated_tokens", "waits", "continuations", "first_token_seconds", "recomputed_tokens")
    RECEIVED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    received_requests: int
    finished_requests: int
    cancelled_requests: int
    rejected_requests: int
    failed_requests: int
    active_requests: int
    max_active_requests: int
    generated_tokens: int
    waits: int
    continuations: int
    first_token_seconds: _histogram_pb2.Histogram
    recomputed_tokens: int
    def __init__(self, received_requests: _Optional[int] = ..., finished_requests: _Optional[int] = ..., cancelled_requests: _Optional[int] = ..., rejected_requests: _Optional[int] = ..., failed_requests: _Optional[int] = ..., active_requests: _Optional[int] = ..., max_active_requests: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., waits: _Optional[int] = ..., continuations: _Optional[int] = ..., first_token_seconds: _Optional[_Union[_histogram_pb2.Histogram, _Mapping]] = ..., recomputed_tokens: _Optional[int] = ...) -> None: ...

class GetTopologyResponse(_message.Message):
    __slots__ = ("epoch", "members", "autoscaled")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    autoscaled: _containers.RepeatedCompositeFieldContainer[Autoscaled]
    def __init__(self, epoch: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., autoscaled: _Optional[_Iterable[_Union[Autoscaled, _Mapping]]] = ...) -> None: ...

class Autoscaled(_message.Message):
    __slots__ = ("role", "expert_group", "min_replicas", "max_replicas", "replicas", "desired_replicas", "busy_share", "queue_seconds", "last_change", "last_change_age_seconds")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_GROUP_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DESIRED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_CHANGE_FIELD_NUMBER: _ClassVar[int]
    LAST_CHANGE_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    role: str
    expert_group: int
    min_replicas: int
    max_replicas: int
    replicas: int
    desired_replicas: int
    busy_share: float
    queue_seconds: float
    last_change: str
    last_change_age_seconds: float
    def __init__(self, role: _Optional[str] = ..., expert_group: _Optional[int] = ..., min_replicas: _Optional[int] = ..., max_replicas: _Optional[int] = ..., replicas: _Optional[int] = ..., desired_replicas: _Optional[int] = ..., busy_share: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., last_change: _Optional[str] = ..., last_change_age_seconds: _Optional[float] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("experts", "attention")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    experts: ScaleExperts
    attention: ScaleAttention
    def __init__(self, experts: _Optional[_Union[ScaleExperts, _Mapping]] = ..., attention: _Optional[_Union[ScaleAttention, _Mapping]] = ...) -> None: ...

class ScaleExperts(_message.Message):
    __slots__ = ("replicas", "group")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    group: int
    def __init__(self, replicas: _Optional[int] = ..., group: _Optional[int] = ...) -> None: ...

class ScaleAttention(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    def __init__(self, replicas: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("epoch", "added", "removed")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    added: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., added: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("actor", "node")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    actor: str
    node: str
    def __init__(self, actor: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("epoch", "removed", "added")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    removed: _containers.RepeatedScalarFieldContainer[str]
    added: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., removed: _Optional[_Iterable[str]] = ..., added: _Optional[_Iterable[str]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("epoch", "moves", "balance_before", "balance_after")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    BALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    moves: _containers.RepeatedCompositeFieldContainer[ExpertMove]
    balance_before: float
    balance_after: float
    def __init__(self, epoch: _Optional[int] = ..., moves: _Optional[_Iterable[_Union[ExpertMove, _Mapping]]] = ..., balance_before: _Optional[float] = ..., balance_after: _Optional[float] = ...) -> None: ...

class ExpertMove(_message.Message):
    __slots__ = ("kind", "replica", "expert")
    KIND_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    kind: ExpertMoveKind
    replica: str
    expert: int
    def __init__(self, kind: _Optional[_Union[ExpertMoveKind, str]] = ..., replica: _Optional[str] = ..., expert: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetKvStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetKvStatsResponse(_message.Message):
    __slots__ = ("stores", "workers")
    STORES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[KvStatOfStore]
    workers: _containers.RepeatedCompositeFieldContainer[KvStatOfWorker]
    def __init__(self, stores: _Optional[_Iterable[_Union[KvStatOfStore, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[KvStatOfWorker, _Mapping]]] = ...) -> None: ...

class KvStatOfStore(_message.Message):
    __slots__ = ("store", "stat", "unavailable")
    STORE_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    store: str
    stat: _kvstore_pb2.KvStatResponse
    unavailable: str
    def __init__(self, store: _Optional[str] = ..., stat: _Optional[_Union[_kvstore_pb2.KvStatResponse, _Mapping]] = ..., unavailable: _Optional[str] = ...) -> None: ...

class KvStatOfWorker(_message.Message):
    __slots__ = ("worker", "stat", "unavailable")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STAT_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    stat: _attention_pb2.AttentionKvStats
    unavailable: str
    def __init__(self, worker: _Optional[str] = ..., stat: _Optional[_Union[_attention_pb2.AttentionKvStats, _Mapping]] = ..., unavailable: _Optional[str] = ...) -> None: ...

class VerifyKvRequest(_message.Message):
    __slots__ = ("tier", "repair")
    TIER_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    tier: _kvstore_pb2.KvTier
    repair: bool
    def __init__(self, tier: _Optional[_Union[_kvstore_pb2.KvTier, str]] = ..., repair: _Optional[bool] = ...) -> None: ...

class VerifyKvResponse(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[VerifiedStore]
    def __init__(self, stores: _Optional[_Iterable[_Union[VerifiedStore, _Mapping]]] = ...) -> None: ...

class VerifiedStore(_message.Message):
    __slots__ = ("store", "verified", "unavailable")
    STORE_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    store: str
    verified: _kvstore_pb2.KvVerifyResponse
    unavailable: str
    def __init__(self, store: _Optional[str] = ..., verified: _Optional[_Union[_kvstore_pb2.KvVerifyResponse, _Mapping]] = ..., unavailable: _Optional[str] = ...) -> None: ...

class EvictKvRequest(_message.Message):
    __slots__ = ("tier", "bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: _kvstore_pb2.KvTier
    bytes: int
    def __init__(self, tier: _Optional[_Union[_kvstore_pb2.KvTier, str]] = ..., bytes: _Optional[int] = ...) -> None: ...

class EvictKvResponse(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[EvictedStore]
    def __init__(self, stores: _Optional[_Iterable[_Union[EvictedStore, _Mapping]]] = ...) -> None: ...

class EvictedStore(_message.Message):
    __slots__ = ("store", "evicted", "unavailable")
    STORE_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    store: str
    evicted: _kvstore_pb2.KvEvictResponse
    unavailable: str
    def __init__(self, store: _Optional[str] = ..., evicted: _Optional[_Union[_kvstore_pb2.KvEvictResponse, _Mapping]] = ..., unavailable: _Optional[str] = ...) -> None: ...

class CollectKvRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectKvResponse(_message.Message):
    __slots__ = ("stores",)
    STORES_FIELD_NUMBER: _ClassVar[int]
    stores: _containers.RepeatedCompositeFieldContainer[CollectedStore]
    def __init__(self, stores: _Optional[_Iterable[_Union[CollectedStore, _Mapping]]] = ...) -> None: ...

class CollectedStore(_message.Message):
    __slots__ = ("store", "collected", "unavailable")
    STORE_FIELD_NUMBER: _ClassVar[int]
    COLLECTED_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    store: str
    collected: _kvstore_pb2.KvGcResponse
    unavailable: str
    def __init__(self, store: _Optional[str] = ..., collected: _Optional[_Union[_kvstore_pb2.KvGcResponse, _Mapping]] = ..., unavailable: _Optional[str] = ...) -> None: ...
