"""What a node's KV store is told when it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.kvstore.store import StoreLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreConfig:
    name: str
    address: str = "127.0.0.1:0"
    # A folder of this store alone, on a file system in memory.
    arena_dir: Path
    ram_bytes: int
    limits: StoreLimits = field(default_factory=StoreLimits)
