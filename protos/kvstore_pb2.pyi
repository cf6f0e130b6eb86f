from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_TIER_UNSPECIFIED: _ClassVar[KvTier]
    KV_TIER_RAM: _ClassVar[KvTier]
    KV_TIER_DISK: _ClassVar[KvTier]
    KV_TIER_PEER: _ClassVar[KvTier]
    KV_TIER_COLD: _ClassVar[KvTier]
KV_TIER_UNSPECIFIED: KvTier
KV_TIER_RAM: KvTier
KV_TIER_DISK: KvTier
KV_TIER_PEER: KvTier
KV_TIER_COLD: KvTier

class WorkerMessage(_message.Message):
    __slots__ = ("call_id", "hello", "locate", "acquire", "cancel", "release", "reserve", "commit", "damaged", "promote")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOCATE_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    PROMOTE_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    hello: Hello
    locate: Locate
    acquire: Acquire
    cancel: CancelAcquire
    release: Release
    reserve: Reserve
    commit: Commit
    damaged: ReportDamaged
    promote: Promote
    def __init__(self, call_id: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., locate: _Optional[_Union[Locate, _Mapping]] = ..., acquire: _Optional[_Union[Acquire, _Mapping]] = ..., cancel: _Optional[_Union[CancelAcquire, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., damaged: _Optional[_Union[ReportDamaged, _Mapping]] = ..., promote: _Optional[_Union[Promote, _Mapping]] = ...) -> None: ...

class StoreMessage(_message.Message):
    __slots__ = ("call_id", "located", "granted", "reserved", "committed")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LOCATED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    located: Located
    granted: Granted
    reserved: Reserved
    committed: Committed
    def __init__(self, call_id: _Optional[int] = ..., located: _Optional[_Union[Located, _Mapping]] = ..., granted: _Optional[_Union[Granted, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("client_id", "worker", "model_digest", "layout_digest")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    worker: str
    model_digest: bytes
    layout_digest: bytes
    def __init__(self, client_id: _Optional[str] = ..., worker: _Optional[str] = ..., model_digest: _Optional[bytes] = ..., layout_digest: _Optional[bytes] = ...) -> None: ...

class Locate(_message.Message):
    __slots__ = ("keys", "timeout_seconds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    timeout_seconds: float
    def __init__(self, keys: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class Located(_message.Message):
    __slots__ = ("tiers", "costs")
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    tiers: bytes
    costs: _containers.RepeatedCompositeFieldContainer[TierCost]
    def __init__(self, tiers: _Optional[bytes] = ..., costs: _Optional[_Iterable[_Union[TierCost, _Mapping]]] = ...) -> None: ...

class Acquire(_message.Message):
    __slots__ = ("keys", "timeout_seconds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    timeout_seconds: float
    def __init__(self, keys: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class Granted(_message.Message):
    __slots__ = ("indexes", "tiers", "leases", "offsets", "lengths", "missed")
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    tiers: _containers.RepeatedScalarFieldContainer[KvTier]
    leases: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    missed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indexes: _Optional[_Iterable[int]] = ..., tiers: _Optional[_Iterable[_Union[KvTier, str]]] = ..., leases: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., missed: _Optional[_Iterable[int]] = ...) -> None: ...

class CancelAcquire(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Release(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leases: _Optional[_Iterable[int]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("keys", "lengths")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, keys: _Optional[bytes] = ..., lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("present", "leases", "offsets")
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    present: _containers.RepeatedScalarFieldContainer[bool]
    leases: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, present: _Optional[_Iterable[bool]] = ..., leases: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leases: _Optional[_Iterable[int]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: int
    def __init__(self, stored: _Optional[int] = ...) -> None: ...

class ReportDamaged(_message.Message):
    __slots__ = ("lease", "reason")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease: int
    reason: str
    def __init__(self, lease: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Promote(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    def __init__(self, keys: _Optional[bytes] = ...) -> None: ...

class TierCost(_message.Message):
    __slots__ = ("tier", "latency_seconds", "bytes_per_second")
    TIER_FIELD_NUMBER: _ClassVar[int]
    LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    tier: KvTier
    latency_seconds: float
    bytes_per_second: float
    def __init__(self, tier: _Optional[_Union[KvTier, str]] = ..., latency_seconds: _Optional[float] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class PeerRequest(_message.Message):
    __slots__ = ("call_id", "contains", "fetch", "suspect")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    CONTAINS_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    contains: bytes
    fetch: bytes
    suspect: bytes
    def __init__(self, call_id: _Optional[int] = ..., contains: _Optional[bytes] = ..., fetch: _Optional[bytes] = ..., suspect: _Optional[bytes] = ...) -> None: ...

class PeerResponse(_message.Message):
    __slots__ = ("call_id", "presence", "part", "absent")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    presence: bytes
    part: PeerPart
    absent: Absent
    def __init__(self, call_id: _Optional[int] = ..., presence: _Optional[bytes] = ..., part: _Optional[_Union[PeerPart, _Mapping]] = ..., absent: _Optional[_Union[Absent, _Mapping]] = ...) -> None: ...

class PeerPart(_message.Message):
    __slots__ = ("index", "total_bytes", "offset", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    total_bytes: int
    offset: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Absent(_message.Message):
    __slots__ = ("indexes",)
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indexes: _Optional[_Iterable[int]] = ...) -> None: ...

class BlobPart(_message.Message):
    __slots__ = ("total_bytes", "offset", "data")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    offset: int
    data: bytes
    def __init__(self, total_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class KvStatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvStatResponse(_message.Message):
    __slots__ = ("store", "uptime_seconds", "workers", "leases", "loads", "loads_without_room", "refused_reservations", "pinned_keys", "tiers", "sessions")
    STORE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LOADS_WITHOUT_ROOM_FIELD_NUMBER: _ClassVar[int]
    REFUSED_RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    PINNED_KEYS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    store: str
    uptime_seconds: float
    workers: int
    leases: int
    loads: int
    loads_without_room: int
    refused_reservations: int
    pinned_keys: int
    tiers: _containers.RepeatedCompositeFieldContainer[KvTierStat]
    sessions: KvSessionsStat
    def __init__(self, store: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., workers: _Optional[int] = ..., leases: _Optional[int] = ..., loads: _Optional[int] = ..., loads_without_room: _Optional[int] = ..., refused_reservations: _Optional[int] = ..., pinned_keys: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[KvTierStat, _Mapping]]] = ..., sessions: _Optional[_Union[KvSessionsStat, _Mapping]] = ...) -> None: ...

class KvSessionsStat(_message.Message):
    __slots__ = ("degraded", "waiting", "damaged")
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    degraded: str
    waiting: int
    damaged: int
    def __init__(self, degraded: _Optional[str] = ..., waiting: _Optional[int] = ..., damaged: _Optional[int] = ...) -> None: ...

class KvTierStat(_message.Message):
    __slots__ = ("tier", "degraded", "blobs", "used_bytes", "budget_bytes", "hits", "misses", "hit_tokens", "loaded_bytes", "load_seconds_p50", "load_seconds_p99", "bytes_per_second", "damaged", "stored_blobs", "stored_bytes", "waiting_blobs", "dropped_blobs", "refused_blobs", "evicted_blobs", "lost_blobs", "lifetime_seconds", "reuse_gap_seconds", "failures")
    class DamagedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TIER_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_P50_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_P99_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_BLOBS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    LOST_BLOBS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REUSE_GAP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    tier: KvTier
    degraded: str
    blobs: int
    used_bytes: int
    budget_bytes: int
    hits: int
    misses: int
    hit_tokens: int
    loaded_bytes: int
    load_seconds_p50: float
    load_seconds_p99: float
    bytes_per_second: float
    damaged: _containers.ScalarMap[str, int]
    stored_blobs: int
    stored_bytes: int
    waiting_blobs: int
    dropped_blobs: int
    refused_blobs: int
    evicted_blobs: int
    lost_blobs: int
    lifetime_seconds: float
    reuse_gap_seconds: float
    failures: _containers.ScalarMap[str, int]
    def __init__(self, tier: _Optional[_Union[KvTier, str]] = ..., degraded: _Optional[str] = ..., blobs: _Optional[int] = ..., used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., hit_tokens: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., load_seconds_p50: _Optional[float] = ..., load_seconds_p99: _Optional[float] = ..., bytes_per_second: _Optional[float] = ..., damaged: _Optional[_Mapping[str, int]] = ..., stored_blobs: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., waiting_blobs: _Optional[int] = ..., dropped_blobs: _Optional[int] = ..., refused_blobs: _Optional[int] = ..., evicted_blobs: _Optional[int] = ..., lost_blobs: _Optional[int] = ..., lifetime_seconds: _Optional[float] = ..., reuse_gap_seconds: _Optional[float] = ..., failures: _Optional[_Mapping[str, int]] = ...) -> None: ...

class KvWhereRequest(_message.Message):
    __slots__ = ("keys", "timeout_seconds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    timeout_seconds: float
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class KvWhereResponse(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[KvTier]
    def __init__(self, tiers: _Optional[_Iterable[_Union[KvTier, str]]] = ...) -> None: ...

class KvPrefetchRequest(_message.Message):
    __slots__ = ("keys", "timeout_seconds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    timeout_seconds: float
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class KvPrefetchResponse(_message.Message):
    __slots__ = ("resident",)
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    resident: int
    def __init__(self, resident: _Optional[int] = ...) -> None: ...

class KvPinRequest(_message.Message):
    __slots__ = ("keys", "until")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    until: float
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., until: _Optional[float] = ...) -> None: ...

class KvPinResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvUnpinRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KvUnpinResponse(_message.Message):
    __slots__ = ("unpinned",)
    UNPINNED_FIELD_NUMBER: _ClassVar[int]
    unpinned: int
    def __init__(self, unpinned: _Optional[int] = ...) -> None: ...

class KvEvictRequest(_message.Message):
    __slots__ = ("tier", "keys", "bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: KvTier
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    bytes: int
    def __init__(self, tier: _Optional[_Union[KvTier, str]] = ..., keys: _Optional[_Iterable[bytes]] = ..., bytes: _Optional[int] = ...) -> None: ...

class KvEvictResponse(_message.Message):
    __slots__ = ("blobs", "freed_bytes")
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    blobs: int
    freed_bytes: int
    def __init__(self, blobs: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class KvVerifyRequest(_message.Message):
    __slots__ = ("tier", "repair")
    TIER_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    tier: KvTier
    repair: bool
    def __init__(self, tier: _Optional[_Union[KvTier, str]] = ..., repair: _Optional[bool] = ...) -> None: ...

class KvVerifyResponse(_message.Message):
    __slots__ = ("blobs", "damaged")
    class DamagedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    blobs: int
    damaged: _containers.ScalarMap[str, int]
    def __init__(self, blobs: _Optional[int] = ..., damaged: _Optional[_Mapping[str, int]] = ...) -> None: ...

class KvGcRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvGcResponse(_message.Message):
    __slots__ = ("dropped_blobs", "freed_bytes", "ended_leases")
    DROPPED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENDED_LEASES_FIELD_NUMBER: _ClassVar[int]
    dropped_blobs: int
    freed_bytes: int
    ended_leases: int
    def __init__(self, dropped_blobs: _Optional[int] = ..., freed_bytes: _Optional[int] = ..., ended_leases: _Optional[int] = ...) -> None: ...

class KvReadRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KvWriteResponse(_message.Message):
    __slots__ = ("stored", "present", "refused")
    STORED_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    stored: int
    present: int
    refused: int
    def __init__(self, stored: _Optional[int] = ..., present: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

class KvSetPeersRequest(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class KvSetPeersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
