"""The whole of `model1 bench dispatch`: set-up, the parts in turn, the report."""

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench_dispatch.report import Report, as_dict, print_tables
from cluster.ray_session import COMPUTE_ENVIRONMENT

PARTS = ("hop", "overlap", "emulated-overlap", "replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How long the parts take."""

    hop_rows: tuple[int, ...] = (1, 32, 64)
    hop_rounds: int = 10
    hop_trips: int = 100
    batches: tuple[int, ...] = (2, 8, 16, 32, 64)
    steps: int = 32
    rows: int = 32
    replicas: tuple[int, ...] = (1, 2, 4)
    replica_rounds: int = 3
    replica_seconds: float = 3.0


QUICK = Scale(
    hop_rows=(8,),
    hop_rounds=2,
    hop_trips=20,
    batches=(4,),
    steps=6,
    replica_rounds=1,
    replica_seconds=0.5,
)


def bench_dispatch(
    parts: Collection[str], scale: Scale, *, gigabytes_per_second: float, as_json: bool
) -> None:
    """Tables for people or one JSON object. Raises `SidesDiffer` if a token differs."""
    os.environ.update(COMPUTE_ENVIRONMENT)  # before torch is imported, and of all processes
    from model1.bench import machine, write_random_checkpoint

    logging.getLogger("services").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="model1-bench-") as folder:
        directory = Path(folder) / "checkpoint"
        directory.mkdir()
        write_random_checkpoint(directory)
        speed = gigabytes_per_second * 1e9
        report = asyncio.run(_measure(directory, Path(folder), scale, parts, speed, machine()))
    if as_json:
        print(json.dumps(as_dict(report)))
    else:
        print_tables(report)


async def _measure(
    directory: Path,
    folder: Path,
    scale: Scale,
    parts: Collection[str],
    speed: float,
    machine: str,
) -> Report:
    from cluster.bench_dispatch.hop import measure_hop
    from cluster.bench_dispatch.overlap import Decoding
    from cluster.bench_dispatch.replicas import measure_replicas
    from cluster.bench_dispatch.rig import opened_rig, tell
    from model1.kv_capacity import PoolCapacity
    from services.attention.loading import load_trunk_and_pool

    found: dict[str, Any] = {}
    tell("starting a router and replicas")
    async with opened_rig(directory, folder) as rig:
        if "hop" in parts:
            found["hops"] = []
            for num_rows in scale.hop_rows:
                tell(f"crossings of {num_rows} rows")
                found["hops"].append(
                    await measure_hop(rig, num_rows, rounds=scale.hop_rounds, trips=scale.hop_trips)
                )
        smallest = PoolCapacity(1, 1, 1)  # of a pool that is thrown away
        trunk, _ = load_trunk_and_pool(directory, dtype="bfloat16", device="cpu", capacity=smallest)
        decoding = Decoding(rig, trunk)
        if "overlap" in parts:
            await rig.use_real()
            found["gains"] = []
            for batch in scale.batches:
                tell(f"batches of {batch}")
                found["gains"].append(await decoding.gain(batch, scale.steps))
            found["costs"] = await decoding.costs(scale.batches[-1], scale.steps)
        if "emulated-overlap" in parts:
            await rig.use_emulated(rig.halved(rig.emulated_addresses), speed)
            found["emulated_gains"] = []
            for batch in scale.batches:
                tell(f"batches of {batch}, emulated expert time")
                found["emulated_gains"].append(await decoding.gain(batch, scale.steps))
        if "replicas" in parts:
            tell("replicas, emulated expert time")
            found["throughputs"] = await measure_replicas(
                rig,
                scale.rows,
                scale.replicas,
                speed=speed,
                rounds=scale.replica_rounds,
                seconds=scale.replica_seconds,
            )
    return Report(machine=machine, emulated_bytes_per_second=speed, **found)
