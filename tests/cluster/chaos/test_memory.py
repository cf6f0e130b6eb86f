import asyncio
import os

import pytest

from cluster.chaos.memory import MIB, MemoryWatch, Process, Sample


async def test_samples_living_processes_and_passes_over_the_dead() -> None:
    watch = MemoryWatch()
    own, dead = Process("own", os.getpid()), Process("dead", 2**22 + 1)
    asked = asyncio.Event()

    async def processes() -> list[Process]:
        asked.set()
        return [own, dead]

    running = asyncio.create_task(watch.run(processes))
    await asked.wait()
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert list(watch.samples) == [own]
    assert watch.samples[own][0].rss_bytes > MIB


def test_the_slope_is_of_the_later_half_of_the_longest_life() -> None:
    grown = [Sample(seconds, 100 * MIB + seconds * MIB) for seconds in range(10)]
    steady = [Sample(10.0 + seconds, 200 * MIB) for seconds in range(10)]
    watch = MemoryWatch(
        samples={
            Process("expert-0-0", 1): grown + steady,
            Process("expert-0-0", 2): grown[:3],
            Process("router-0", 3): [Sample(float(s), s * MIB) for s in range(20)],
            Process("short", 4): grown[:4],
        }
    )
    slopes = watch.slopes()
    assert slopes == {"expert-0-0": 0.0, "router-0": pytest.approx(60.0)}
