"""From a checkpoint directory to what a worker computes with.

Takes the dtype and the KV format by name, so that whoever starts workers needs no torch.
"""

from pathlib import Path

import torch

from model1.checkpoint import load_config, load_experts, load_trunk
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVFormat
from model1.kv_pool import KVPool
from model1.model import Model
from model1.modules import packed
from model1.trunk import Trunk
from services.attention.engine import Engine, EngineConfig
from services.attention.local import LocalExperts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def capacity_within(
    num_bytes: int,
    directory: Path,
    *,
    dtype: str,
    max_sequences: int,
    max_step_tokens: int,
    kv_format: str = KVFormat.NATIVE,
    hot_entries: int | None = None,
) -> PoolCapacity:
    """What a pool of so many bytes on the device holds of this model. Raises a `ModelError`."""
    return PoolCapacity.within(
        num_bytes,
        load_config(directory),
        _DTYPES[dtype],
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        kv_format=KVFormat(kv_format),
        hot_entries=hot_entries,
    )


def load_trunk_and_pool(
    directory: Path,
    *,
    dtype: str,
    device: str,
    capacity: PoolCapacity,
    kv_format: str = KVFormat.NATIVE,
) -> tuple[Trunk, KVPool]:
    """What an attention worker holds. Raises a `ModelError`."""
    trunk = packed(load_trunk(directory, _DTYPES[dtype], device))
    pool = KVPool(trunk.config, capacity, _DTYPES[dtype], device, kv_format=KVFormat(kv_format))
    return trunk, pool


def load_local_engine(
    directory: Path,
    *,
    dtype: str,
    device: str,
    capacity: PoolCapacity,
    config: EngineConfig,
    kv_format: str = KVFormat.NATIVE,
) -> Engine:
    """A worker's engine with every routed expert in the same process."""
    trunk, pool = load_trunk_and_pool(
        directory, dtype=dtype, device=device, capacity=capacity, kv_format=kv_format
    )
    every_expert = range(trunk.config.n_routed_experts)
    bank = packed(load_experts(directory, every_expert, _DTYPES[dtype], device))
    return Engine(trunk, pool, LocalExperts(bank), config)


def load_model(directory: Path, *, dtype: str) -> Model:
    """Everything in one, as the oracle of a deployment."""
    return Model.from_checkpoint(directory, _DTYPES[dtype])
