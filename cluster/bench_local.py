"""One side of `model1 bench serve`: the same engine with every expert in one process.

Run as `python -m cluster.bench_local`, it is that process: the settings as a JSON line on stdin,
then a workload in every further line, each answered by a JSON line on stdout. It ends with its
stdin. `one_process` is its other end.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict

from cluster.bench_child import Child, started
from cluster.bench_workload import Measured, Workload, measure
from cluster.config import Settings
from cluster.preflight import model_directory
from services.generation import GenerationRequest


class OneProcess:
    def __init__(self, child: Child) -> None:
        self._child = child

    async def run(self, workload: Workload) -> Measured:
        fields = json.loads(await self._child.ask(json.dumps(asdict(workload))))
        return Measured(**fields | {"answers": tuple(map(tuple, fields["answers"]))})


@asynccontextmanager
async def one_process(settings: Settings) -> AsyncIterator[OneProcess]:
    """Loaded and idle until it is told to run."""
    async with started("cluster.bench_local") as child:
        await child.ask(settings.model_dump_json())
        yield OneProcess(child)


async def _serve(settings: Settings) -> None:
    from model1.kv_capacity import PoolCapacity
    from services.attention.engine import EngineConfig
    from services.attention.loading import load_local_engine
    from services.attention.scheduler import SchedulerLimits

    limits = settings.attention
    engine = load_local_engine(
        model_directory(settings.model),
        dtype=settings.model.dtype,
        device=settings.model.device,
        capacity=PoolCapacity(
            limits.max_sequences, limits.kv_tokens, limits.max_batch_tokens, limits.hot_entries
        ),
        config=EngineConfig(
            limits=SchedulerLimits(
                max_batch_tokens=limits.max_batch_tokens,
                max_sequences=limits.max_sequences,
                max_waiting=limits.max_waiting_requests,
            )
        ),
        kv_format=limits.kv_format,
    )

    async def generate(request: GenerationRequest) -> AsyncIterator[Iterable[int]]:
        with engine.submit(request) as stream:
            async for event in stream:
                yield event.token_ids

    running = asyncio.create_task(engine.run())
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        measured = await measure(Workload(**json.loads(line)), generate)
        print(json.dumps(asdict(measured)), flush=True)
    engine.close()
    await running


if __name__ == "__main__":
    asyncio.run(_serve(Settings.model_validate_json(sys.stdin.readline())))
