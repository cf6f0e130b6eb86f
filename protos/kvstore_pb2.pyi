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
    __slots__ = ("client_id", "worker", "held_leases", "model_digest", "layout_digest")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    HELD_LEASES_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    worker: str
    held_leases: _containers.RepeatedScalarFieldContainer[int]
    model_digest: bytes
    layout_digest: bytes
    def __init__(self, client_id: _Optional[str] = ..., worker: _Optional[str] = ..., held_leases: _Optional[_Iterable[int]] = ..., model_digest: _Optional[bytes] = ..., layout_digest: _Optional[bytes] = ...) -> None: ...

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
    __slots__ = ("grants", "missed")
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    missed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., missed: _Optional[_Iterable[int]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("index", "tier", "lease", "offset", "length")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    index: int
    tier: KvTier
    lease: int
    offset: int
    length: int
    def __init__(self, index: _Optional[int] = ..., tier: _Optional[_Union[KvTier, str]] = ..., lease: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class CancelAcquire(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Release(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, leases: _Optional[_Iterable[int]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ReserveItem]
    def __init__(self, items: _Optional[_Iterable[_Union[ReserveItem, _Mapping]]] = ...) -> None: ...

class ReserveItem(_message.Message):
    __slots__ = ("key", "length")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    length: int
    def __init__(self, key: _Optional[bytes] = ..., length: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("rooms",)
    ROOMS_FIELD_NUMBER: _ClassVar[int]
    rooms: _containers.RepeatedCompositeFieldContainer[Room]
    def __init__(self, rooms: _Optional[_Iterable[_Union[Room, _Mapping]]] = ...) -> None: ...

class Room(_message.Message):
    __slots__ = ("present", "lease", "offset")
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    present: bool
    lease: int
    offset: int
    def __init__(self, present: _Optional[bool] = ..., lease: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

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

class KvStatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvStatResponse(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...
