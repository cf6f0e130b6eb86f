"""What a node's KV store is told when it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.kvstore.blocking import ColdConfig
from services.kvstore.disk import DiskConfig
from services.kvstore.peer_link import PeerLimits
from services.kvstore.session_rows import Durability
from services.kvstore.store import StoreLimits
from services.tls import Tls


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig:
    """A tier that is None is off."""

    name: str
    address: str = "127.0.0.1:0"
    # A folder of this store alone, on a file system in memory.
    arena_dir: Path
    ram_bytes: int
    disk: DiskConfig | None = None
    cold: ColdConfig | None = None
    # Other nodes' stores.
    peers: tuple[str, ...] = ()
    tls: Tls | None = None
    # Session records: in memory only where it is None.
    sessions_dir: Path | None = None
    sessions_durability: Durability = Durability.INTERVAL
    # What nobody asks for in that time leaves RAM.
    ttl_seconds: float | None = None
    limits: StoreLimits = field(default_factory=StoreLimits)
    peer_limits: PeerLimits = field(default_factory=PeerLimits)
