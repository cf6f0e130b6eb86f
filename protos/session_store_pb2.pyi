from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRecord(_message.Message):
    __slots__ = ("session_id", "cache_salt", "version", "num_tokens", "token_ids", "kv_root", "created_unix_seconds", "last_used_unix_seconds", "pinned_until_unix_seconds", "worker", "deleted")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    KV_ROOT_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_UNTIL_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    cache_salt: str
    version: int
    num_tokens: int
    token_ids: bytes
    kv_root: bytes
    created_unix_seconds: float
    last_used_unix_seconds: float
    pinned_until_unix_seconds: float
    worker: str
    deleted: bool
    def __init__(self, session_id: _Optional[str] = ..., cache_salt: _Optional[str] = ..., version: _Optional[int] = ..., num_tokens: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., kv_root: _Optional[bytes] = ..., created_unix_seconds: _Optional[float] = ..., last_used_unix_seconds: _Optional[float] = ..., pinned_until_unix_seconds: _Optional[float] = ..., worker: _Optional[str] = ..., deleted: _Optional[bool] = ...) -> None: ...

class GetSessionRecordRequest(_message.Message):
    __slots__ = ("session_id", "cache_salt", "ask_cold")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ASK_COLD_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    cache_salt: str
    ask_cold: bool
    def __init__(self, session_id: _Optional[str] = ..., cache_salt: _Optional[str] = ..., ask_cold: _Optional[bool] = ...) -> None: ...

class GetSessionRecordResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: SessionRecord
    def __init__(self, record: _Optional[_Union[SessionRecord, _Mapping]] = ...) -> None: ...

class PutSessionRecordRequest(_message.Message):
    __slots__ = ("record", "expected_version")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    record: SessionRecord
    expected_version: int
    def __init__(self, record: _Optional[_Union[SessionRecord, _Mapping]] = ..., expected_version: _Optional[int] = ...) -> None: ...

class PutSessionRecordResponse(_message.Message):
    __slots__ = ("accepted", "version")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    version: int
    def __init__(self, accepted: _Optional[bool] = ..., version: _Optional[int] = ...) -> None: ...

class ListSessionRecordsRequest(_message.Message):
    __slots__ = ("cache_salt", "max_records")
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    MAX_RECORDS_FIELD_NUMBER: _ClassVar[int]
    cache_salt: str
    max_records: int
    def __init__(self, cache_salt: _Optional[str] = ..., max_records: _Optional[int] = ...) -> None: ...

class ListSessionRecordsResponse(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[SessionRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[SessionRecord, _Mapping]]] = ...) -> None: ...
