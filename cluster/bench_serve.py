"""`model1 bench serve`: a real deployment against one process, on the same random weights.

The *mini* model in bfloat16, one compute thread a process. The sides take turns, and whoever is not
running is idle, so that whatever else the machine does falls on both. Reports; judges nothing but
that both give the same tokens. Progress goes to stderr.
"""

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.bench_echo import Echo, HopBytes, echo
from cluster.bench_local import OneProcess, one_process
from cluster.bench_workload import Measured, SidesDiffer, Workload, measure
from cluster.config import load_settings
from cluster.deployment import Deployment, Site, deployed, prepared
from cluster.output import text_table
from cluster.ray_session import COMPUTE_ENVIRONMENT
from cluster.serve import cancel_on_signals
from cluster.topology import Role
from model1 import shipped_model_dir
from model1.checkpoint import load_config
from protos import attention_pb2, attention_pb2_grpc
from services import rpc
from services.attention.stats import Percentiles
from services.gateway.worker import Worker, WorkerAddress, WorkerTokens
from services.generation import GenerationRequest

ROUND_TRIPS_A_PAIR = 500
WARM_UP_TOKENS = 4
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


@dataclass(frozen=True, slots=True)
class Pair:
    """One speed of both sides in one turn, tokens/s."""

    distributed: float
    one_process: float

    @property
    def ratio(self) -> float:
        return self.distributed / self.one_process


@dataclass(frozen=True, slots=True)
class Pairs:
    """One speed of both sides, turn by turn."""

    turns: tuple[Pair, ...]

    @property
    def medians(self) -> Pair:
        return Pair(
            statistics.median(pair.distributed for pair in self.turns),
            statistics.median(pair.one_process for pair in self.turns),
        )

    @property
    def ratio(self) -> float:
        """Median of the turns' ratios."""
        return statistics.median(pair.ratio for pair in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Times in seconds. Crossings are those of a full batch that decodes."""

    machine: str
    workload: Workload
    throughput: Pairs  # all tokens over the whole time, the prompts' included
    decode: Pairs  # while every request decodes
    crossing: Percentiles
    crossing_wait: Percentiles  # with nothing to compute
    # Where a step ran as two micro-batches: of half as many rows.
    half_crossing: Percentiles
    half_crossing_wait: Percentiles
    overlapped_share: float  # of all steps
    echo: Percentiles
    request_bytes: int
    reply_bytes: int


def bench_serve(*, num_pairs: int, as_json: bool) -> None:
    """The whole benchmark; a table for people or one JSON object."""
    from model1.bench import machine, write_random_checkpoint  # torch: seconds

    with tempfile.TemporaryDirectory(prefix="model1-bench-") as folder:
        _tell("writing the mini checkpoint")
        directory = Path(folder)
        write_random_checkpoint(directory)
        shutil.copy(shipped_model_dir() / "tokenizer.json", directory)
        report = compare(directory, Workload(), num_pairs=num_pairs, machine=machine())
    if as_json:
        print(json.dumps(_as_dict(report)))
    else:
        _print_tables(report)


def compare(directory: Path, workload: Workload, *, num_pairs: int, machine: str) -> Report:
    """Raises `SidesDiffer`, or whatever keeps a side from running."""
    # Of both sides, and before any of their processes starts.
    os.environ.update(COMPUTE_ENVIRONMENT)
    flags = {
        "model.path": directory,
        "model.dtype": "bfloat16",
        "gateway.port": 0,
        "kv.enabled": False,  # the other side has none
    }
    settings = load_settings(flags=flags)
    _tell("starting Ray")
    with redirect_stdout(sys.stderr), prepared(settings) as site:
        return asyncio.run(_compare(site, workload, num_pairs=num_pairs, machine=machine))


async def _compare(site: Site, workload: Workload, *, num_pairs: int, machine: str) -> Report:
    cancel_on_signals()
    model = load_config(site.settings.model.path or shipped_model_dir())
    pairs_bytes = model.num_experts_per_tok * (4 + FLOAT32_BYTES)
    request_bytes = workload.batch * (model.hidden_size * BFLOAT16_BYTES + pairs_bytes)
    reply_bytes = workload.batch * model.hidden_size * FLOAT32_BYTES
    with tempfile.TemporaryDirectory(prefix="model1-") as folder:
        address = f"unix:{folder}/echo.sock"
        _tell("starting the actors, one process and an echo")
        async with (
            deployed(site) as deployment,
            one_process(site.settings) as alone,
            echo(address, HopBytes(request_bytes, reply_bytes)) as echoing,
        ):
            worker = await _worker_address(deployment)
            turns = await _take_turns(worker, alone, echoing, workload, num_pairs)
            whole = await _stats(worker, workload.batch)
            half = await _stats(worker, workload.batch // 2)
    return Report(
        machine=machine,
        workload=workload,
        throughput=turns.pairs(lambda measured: measured.tokens_per_second),
        decode=turns.pairs(lambda measured: measured.decode_tokens_per_second),
        crossing=Percentiles(whole.crossing_seconds_p50, whole.crossing_seconds_p99),
        crossing_wait=Percentiles(whole.crossing_wait_seconds_p50, whole.crossing_wait_seconds_p99),
        half_crossing=Percentiles(half.crossing_seconds_p50, half.crossing_seconds_p99),
        half_crossing_wait=Percentiles(
            half.crossing_wait_seconds_p50, half.crossing_wait_seconds_p99
        ),
        overlapped_share=whole.overlapped_steps / whole.steps,
        echo=Percentiles.of(turns.round_trips),
        request_bytes=request_bytes,
        reply_bytes=reply_bytes,
    )


@dataclass(slots=True)
class _Turns:
    """What is measured while the sides take turns."""

    distributed: list[Measured]
    one_process: list[Measured]
    round_trips: list[float]

    def pairs(self, speed: Callable[[Measured], float]) -> Pairs:
        sides = zip(self.distributed, self.one_process, strict=True)
        return Pairs(tuple(Pair(speed(ours), speed(theirs)) for ours, theirs in sides))


async def _take_turns(
    worker: WorkerAddress, alone: OneProcess, echoing: Echo, workload: Workload, num_pairs: int
) -> _Turns:
    client = Worker(worker)

    async def generate(request: GenerationRequest) -> AsyncIterator[Iterable[int]]:
        async for event in client.generate(request, timeout_s=None):
            if isinstance(event, WorkerTokens):
                yield event.token_ids

    turns = _Turns([], [], [])
    try:
        _tell("warming up")  # every weight read, every stream opened
        short = replace(workload, max_tokens=WARM_UP_TOKENS)
        _check_same(await measure(short, generate), await alone.run(short))
        for pair in range(1, num_pairs + 1):
            turns.distributed.append(await measure(workload, generate))
            turns.one_process.append(await alone.run(workload))
            turns.round_trips += await echoing.round_trips(ROUND_TRIPS_A_PAIR)
            ours, theirs = turns.distributed[-1], turns.one_process[-1]
            _check_same(ours, theirs)
            _tell(
                f"pair {pair} of {num_pairs}: {ours.decode_tokens_per_second:.0f} tokens/s "
                f"distributed, {theirs.decode_tokens_per_second:.0f} in one process"
            )
    finally:
        await client.close()
    return turns


def _check_same(distributed: Measured, one_process: Measured) -> None:
    answers = zip(distributed.answers, one_process.answers, strict=True)
    if wrong := [index for index, (ours, theirs) in enumerate(answers) if ours != theirs]:
        raise SidesDiffer(f"requests {wrong} got other tokens than in one process")


async def _worker_address(deployment: Deployment) -> WorkerAddress:
    snapshot = await deployment.supervisor.snapshot()
    return next(
        WorkerAddress(member.spec.name, member.address)
        for member in snapshot.members
        if member.spec.role is Role.ATTENTION
    )


async def _stats(worker: WorkerAddress, num_rows: int) -> attention_pb2.AttentionStatsResponse:
    """The crossing times in it are those of crossings of so many rows; 0 if there was none."""
    async with rpc.channel(worker.address) as channel:
        stub = attention_pb2_grpc.AttentionStub(channel)
        stats: attention_pb2.AttentionStatsResponse = await stub.Stats(
            attention_pb2.AttentionStatsRequest(crossing_rows=num_rows)
        )
        return stats


def _print_tables(report: Report) -> None:
    work = report.workload
    num_pairs = len(report.decode.turns)
    print(
        f"mini, bfloat16, one compute thread a process, {report.machine}\n"
        f"{work.batch} requests at once, prompts of {work.min_prompt_tokens} to "
        f"{work.max_prompt_tokens} tokens, {work.max_tokens} new tokens each; {num_pairs} "
        "pairs of runs in turns; the same tokens on both sides\n"
    )
    whole, decode = report.throughput, report.decode
    rows = [
        (str(number), *_cells(run, run.ratio), *_cells(decoding, decoding.ratio))
        for number, (run, decoding) in enumerate(
            zip(whole.turns, decode.turns, strict=True), start=1
        )
    ]
    medians = (*_cells(whole.medians, whole.ratio), *_cells(decode.medians, decode.ratio))
    rows.append(("median", *medians))
    columns = ("distributed", "one process", "ratio")
    print(text_table(("tokens/s", *columns, *(f"decode: {name}" for name in columns)), rows))
    print(f"steps as two micro-batches: {report.overlapped_share:.0%}\n")
    request_kib, reply_kib = report.request_bytes / 1024, report.reply_bytes / 1024
    times = {
        f"layer crossing of {work.batch} rows": report.crossing,
        "  of it waiting": report.crossing_wait,
        f"of a micro-batch's {work.batch // 2} rows": report.half_crossing,
        "  of it waiting, the other computed": report.half_crossing_wait,
        f"bare gRPC echo, {request_kib:.0f} KiB there, {reply_kib:.0f} KiB back": report.echo,
    }
    cells = [(name, f"{t.p50 * 1e3:.2f}", f"{t.p99 * 1e3:.2f}") for name, t in times.items()]
    print(text_table(("milliseconds", "p50", "p99"), cells))


def _cells(pair: Pair, ratio: float) -> tuple[str, str, str]:
    return f"{pair.distributed:.1f}", f"{pair.one_process:.1f}", f"{ratio:.2f}x"


def _as_dict(report: Report) -> dict[str, object]:
    return asdict(report) | {
        "tokens_per_second": asdict(report.throughput.medians),
        "ratio": report.throughput.ratio,
        "decode_tokens_per_second": asdict(report.decode.medians),
        "decode_ratio": report.decode.ratio,
        "tokens_identical": True,  # or there would be no report
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
