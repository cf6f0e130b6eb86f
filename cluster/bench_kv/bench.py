"""The whole of `model1 bench kv`: set-up, the parts in turn, the report."""

import asyncio
import json
import logging
import os
import tempfile
from collections.abc import Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench_kv.bandwidth import measure_bandwidth
from cluster.bench_kv.budget import Load, measure_budgets
from cluster.bench_kv.no_reuse import measure_no_reuse
from cluster.bench_kv.plot import write_plot
from cluster.bench_kv.report import Report, as_dict, print_tables
from cluster.bench_kv.resume import measure_resume
from cluster.bench_kv.rig import Rig, tell
from cluster.bench_kv.store_process import StoreSettings, bench_store
from cluster.figure import require_plot
from cluster.ray_session import COMPUTE_ENVIRONMENT
from services.kvstore.tier import Tier

PARTS = ("budget", "resume", "bandwidth", "no-reuse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How long the parts take."""

    load: Load = field(default_factory=Load)
    savings: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    bandwidth_lengths: tuple[int, ...] = (8192, 32768, 131_072)
    repeats: int = 3
    requests: int = 40


QUICK = Scale(
    load=Load(sessions=4, history_tokens=512, turns=1),
    savings=(0.4,),
    lengths=(128, 512),
    bandwidth_lengths=(2048,),
    repeats=1,
    requests=4,
)


def bench_kv(
    parts: Collection[str], *, quick: bool, as_json: bool, plot: Path | None = None
) -> None:
    """Tables for people or one JSON object. Raises `SidesDiffer` if a token differs."""
    if plot is not None:
        require_plot(plot)
    os.environ.update(COMPUTE_ENVIRONMENT)  # before torch is imported
    from model1.bench import machine, write_random_checkpoint

    logging.getLogger("services").setLevel(logging.ERROR)  # stores come and go here
    with tempfile.TemporaryDirectory(prefix="model1-bench-") as folder:
        directory = Path(folder) / "checkpoint"
        directory.mkdir()
        tell("writing the mini checkpoint")
        write_random_checkpoint(directory)
        scale = QUICK if quick else Scale()
        report = asyncio.run(_measure(directory, Path(folder), scale, parts, machine()))
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        print(json.dumps(as_dict(report)))
    else:
        print_tables(report)


async def _measure(
    directory: Path, folder: Path, scale: Scale, parts: Collection[str], machine: str
) -> Report:
    settings = StoreSettings(str(folder), ram_bytes=1 << 30, disk_bytes=4 << 30, cold_bytes=2 << 30)
    found: dict[str, Any] = {}
    async with AsyncExitStack() as opened:
        store = await opened.enter_async_context(bench_store(settings))
        rig = Rig(directory, store)
        if "bandwidth" in parts:
            found["bandwidths"] = [
                await measure_bandwidth(rig, folder, length, scale.repeats + 2)
                for length in scale.bandwidth_lengths
            ]
        if "no-reuse" in parts:
            found["no_reuse"] = await measure_no_reuse(rig, scale.requests)
        if "resume" in parts:
            tiers = [Tier.RAM, Tier.DISK, Tier.COLD]
            found["resumed"] = await measure_resume(rig, scale.lengths, tiers, scale.repeats)
        if "budget" in parts:
            found["budgets"] = await measure_budgets(rig, scale.load, scale.savings)
    return Report(machine=machine, load=scale.load, **found)
