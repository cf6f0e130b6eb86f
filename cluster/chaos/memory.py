"""Resident memory of processes over time, and how fast it grows."""

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

INTERVAL_SECONDS = 2.0
MIN_SAMPLES = 5
MIB = 2**20


class Process(NamedTuple):
    name: str
    pid: int


class Sample(NamedTuple):
    seconds: float
    rss_bytes: int


@dataclass(slots=True)
class MemoryWatch:
    """Samples of each process; one that was started anew is another process."""

    samples: dict[Process, list[Sample]] = field(default_factory=dict)

    async def run(self, processes: Callable[[], Awaitable[Iterable[Process]]]) -> None:
        """Until cancelled."""
        while True:
            for process in await processes():
                if rss_bytes := _rss_bytes(process.pid):
                    sample = Sample(time.monotonic(), rss_bytes)
                    self.samples.setdefault(process, []).append(sample)
            await asyncio.sleep(INTERVAL_SECONDS)

    def slopes(self) -> dict[str, float]:
        """MiB a minute of each process's later half: at first all of them grow to their size.

        Of a name that several processes had, the one that lived longest.
        """
        longest: dict[str, list[Sample]] = {}
        for process, samples in self.samples.items():
            if len(samples) > len(longest.get(process.name, ())):
                longest[process.name] = samples
        return {
            name: _slope(samples[len(samples) // 2 :])
            for name, samples in sorted(longest.items())
            if len(samples) >= 2 * MIN_SAMPLES
        }


def _slope(samples: list[Sample]) -> float:
    seconds = [sample.seconds for sample in samples]
    sizes = [float(sample.rss_bytes) for sample in samples]
    return statistics.linear_regression(seconds, sizes).slope * 60 / MIB


def _rss_bytes(pid: int) -> int:
    """0 if it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
