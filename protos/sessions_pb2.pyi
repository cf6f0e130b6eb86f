from protos import kvstore_pb2 as _kvstore_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionName(_message.Message):
    __slots__ = ("session_id", "cache_salt")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    cache_salt: str
    def __init__(self, session_id: _Optional[str] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("session_id", "version", "num_tokens", "created_unix_seconds", "last_used_unix_seconds", "pinned_until_unix_seconds", "worker", "in_turn")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNTIL_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    IN_TURN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    version: int
    num_tokens: int
    created_unix_seconds: float
    last_used_unix_seconds: float
    pinned_until_unix_seconds: float
    worker: str
    in_turn: bool
    def __init__(self, session_id: _Optional[str] = ..., version: _Optional[int] = ..., num_tokens: _Optional[int] = ..., created_unix_seconds: _Optional[float] = ..., last_used_unix_seconds: _Optional[float] = ..., pinned_until_unix_seconds: _Optional[float] = ..., worker: _Optional[str] = ..., in_turn: _Optional[bool] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("cache_salt", "max_sessions")
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    cache_salt: str
    max_sessions: int
    def __init__(self, cache_salt: _Optional[str] = ..., max_sessions: _Optional[int] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ...) -> None: ...

class ShowSessionRequest(_message.Message):
    __slots__ = ("name", "with_history")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WITH_HISTORY_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    with_history: bool
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ..., with_history: _Optional[bool] = ...) -> None: ...

class ShowSessionResponse(_message.Message):
    __slots__ = ("session", "kv", "token_ids", "text")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    session: Session
    kv: SessionKv
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., kv: _Optional[_Union[SessionKv, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ...) -> None: ...

class SessionKv(_message.Message):
    __slots__ = ("ram_tokens", "disk_tokens", "peer_tokens", "cold_tokens", "missing_tokens")
    RAM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COLD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MISSING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ram_tokens: int
    disk_tokens: int
    peer_tokens: int
    cold_tokens: int
    missing_tokens: int
    def __init__(self, ram_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., cold_tokens: _Optional[int] = ..., missing_tokens: _Optional[int] = ...) -> None: ...

class PinSessionRequest(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    seconds: float
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ..., seconds: _Optional[float] = ...) -> None: ...

class PinSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class UnpinSessionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ...) -> None: ...

class UnpinSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class PrefetchSessionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ...) -> None: ...

class PrefetchSessionResponse(_message.Message):
    __slots__ = ("kv",)
    KV_FIELD_NUMBER: _ClassVar[int]
    kv: SessionKv
    def __init__(self, kv: _Optional[_Union[SessionKv, _Mapping]] = ...) -> None: ...

class ReleaseSessionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ...) -> None: ...

class ReleaseSessionResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("name", "with_kv")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WITH_KV_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    with_kv: bool
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ..., with_kv: _Optional[bool] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionHistory(_message.Message):
    __slots__ = ("token_ids", "kv_root", "created_unix_seconds", "checksum")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_ROOT_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    kv_root: bytes
    created_unix_seconds: float
    checksum: bytes
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., kv_root: _Optional[bytes] = ..., created_unix_seconds: _Optional[float] = ..., checksum: _Optional[bytes] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("name", "without_kv")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_KV_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    without_kv: bool
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ..., without_kv: _Optional[bool] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("history", "blob")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    history: SessionHistory
    blob: _kvstore_pb2.BlobPart
    def __init__(self, history: _Optional[_Union[SessionHistory, _Mapping]] = ..., blob: _Optional[_Union[_kvstore_pb2.BlobPart, _Mapping]] = ...) -> None: ...

class ImportSession(_message.Message):
    __slots__ = ("name", "history")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    name: SessionName
    history: SessionHistory
    def __init__(self, name: _Optional[_Union[SessionName, _Mapping]] = ..., history: _Optional[_Union[SessionHistory, _Mapping]] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("session", "blob")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    session: ImportSession
    blob: _kvstore_pb2.BlobPart
    def __init__(self, session: _Optional[_Union[ImportSession, _Mapping]] = ..., blob: _Optional[_Union[_kvstore_pb2.BlobPart, _Mapping]] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("session", "kept_blobs", "refused_blobs")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEPT_BLOBS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_BLOBS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    kept_blobs: int
    refused_blobs: int
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., kept_blobs: _Optional[int] = ..., refused_blobs: _Optional[int] = ...) -> None: ...
