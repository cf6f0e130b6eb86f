"""The whole of `model1 bench balance`: a deployment that rebalances by itself, crossings whose hot
experts change, and streams whose every token is compared. Progress goes to stderr.
"""

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cluster.access import access
from cluster.bench_balance.crossings import CrossingLoad
from cluster.bench_balance.report import TARGET, Drift, Gaps, Report, as_dict, print_tables
from cluster.bench_balance.windows import (
    KEPT_SECONDS,
    Balanced,
    Counted,
    balances,
    seconds_until_kept,
)
from cluster.bench_balance.zipf import DriftingExperts
from cluster.bench_workload import SidesDiffer
from cluster.chaos.questions import Question, known_questions
from cluster.chaos.traffic import Exchange, Traffic
from cluster.client import Client, connected
from cluster.config import Settings, load_settings
from cluster.deployment import Site, deployed, prepared
from cluster.expert_placement import BalanceSettings, balance_bound
from cluster.expert_shift import Shift
from cluster.ray_session import COMPUTE_ENVIRONMENT
from cluster.serve import cancel_on_signals
from cluster.topology import Role
from model1 import shipped_model_dir
from model1.checkpoint import load_config
from model1.config import ModelConfig

EXPONENT = 1.2
REBALANCE_SECONDS = 5.0
# Between two rebalances: then a like time without moves is looked at.
CONTROL_SECONDS = REBALANCE_SECONDS / 2
READ_SECONDS = 1.0
NUM_QUESTIONS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    drifts: int = 3
    every_seconds: float = 60.0
    replicas: int = 8  # each an expert group of its own
    streams: int = 4
    crossings_per_second: float = 25.0
    seed: int = 0


def bench_balance(plan: Plan, *, as_json: bool) -> None:
    """Raises `SidesDiffer` after the report if an answer was wrong or missing."""
    from model1.bench import write_random_checkpoint  # torch: seconds

    with tempfile.TemporaryDirectory(prefix="model1-bench-") as folder:
        _tell("writing the mini checkpoint")
        directory = Path(folder)
        write_random_checkpoint(directory)
        shutil.copy(shipped_model_dir() / "tokenizer.json", directory)
        report = measure(directory, plan)
    if as_json:
        print(json.dumps(as_dict(report)))
    else:
        print_tables(report)
    if report.wrong or report.failed:
        raise SidesDiffer(
            f"{len(report.wrong)} wrong answers, {len(report.failed)} failures; again with "
            f"--seed {plan.seed}"
        )


def measure(directory: Path, plan: Plan, dtype: str = "bfloat16") -> Report:
    """Raises whatever keeps the deployment from running."""
    os.environ.update(COMPUTE_ENVIRONMENT)  # of all processes, and before torch is imported
    from model1.bench import machine

    settings = load_settings(
        flags={
            "model.path": directory,
            "model.dtype": dtype,
            "gateway.port": 0,
            "kv.enabled": False,
            "topology.expert_groups": plan.replicas,
            "cluster.rebalance_seconds": REBALANCE_SECONDS,
        }
    )
    _tell(f"seed {plan.seed}")
    questions = known_questions(
        directory, dtype=dtype, count=NUM_QUESTIONS, seed=plan.seed, told=_tell
    )
    _tell("starting Ray")
    with redirect_stdout(sys.stderr), prepared(settings) as site:
        return asyncio.run(_measure(site, plan, questions, machine()))


async def _measure(site: Site, plan: Plan, questions: Sequence[Question], machine: str) -> Report:
    cancel_on_signals()
    settings = site.settings
    model = load_config(settings.model.path or shipped_model_dir())
    drawn = DriftingExperts(
        model.n_routed_experts, model.num_experts_per_tok, EXPONENT, seed=plan.seed
    )
    _tell("starting the actors")
    async with (
        deployed(site) as deployment,
        connected(access(settings, deployment.endpoint)) as client,
    ):
        load = CrossingLoad(
            await _router_address(client),
            model,
            drawn,
            crossings_per_second=plan.crossings_per_second,
            dtype=settings.model.dtype,
            seed=plan.seed,
        )
        traffic = Traffic(client.channel, questions, streams=plan.streams, seed=plan.seed)
        counted: list[Counted] = []
        starts: list[float] = []
        bounds: list[float] = []
        async with asyncio.TaskGroup() as group:
            streams = group.create_task(traffic.run())
            begun = time.monotonic()
            async with _beside(load.run(), _read(client, counted)):
                for number in range(plan.drifts):
                    if number:
                        drawn.drift()
                    starts.append(time.monotonic())
                    bounds.append(_bound(drawn, model, settings, plan.replicas))
                    await _told(starts[-1] + plan.every_seconds, counted, number, streams)
            ended = time.monotonic()
            traffic.stop()
        shifts = await deployment.supervisor.shifts()
    if load.num_late:
        _tell(f"{load.num_late} crossings were not sent: the machine did not keep up")
    found = balances(counted)
    moving = [shift for shift in shifts if shift.num_moves]
    first, last = counted[0], counted[-1]
    pairs = sum(last.pairs.values()) - sum(first.pairs.values())
    gaps = split_gaps(traffic.log.exchanges, moving, begun, ended)
    return Report(
        machine=machine,
        seed=plan.seed,
        num_experts=model.n_routed_experts,
        topk=model.num_experts_per_tok,
        num_replicas=plan.replicas,
        redundancy=settings.cluster.expert_redundancy,
        exponent=EXPONENT,
        num_hot=drawn.num_hot,
        pairs_per_second=pairs / (last.at - first.at),
        drifts=tuple(
            _drift(start, until, begun, found, moving, bound)
            for start, until, bound in zip(starts, [*starts[1:], ended], bounds, strict=True)
        ),
        moving_seconds=sum(shift.ended - shift.begun for shift in moving),
        gaps_moving=Gaps.of(gaps.moving),
        gaps_later=Gaps.of(gaps.later),
        gaps_still=Gaps.of(gaps.still),
        num_crossings=load.num_answered,
        num_answers=traffic.log.num_answered,
        num_tokens=traffic.log.num_tokens,
        wrong=tuple(traffic.log.wrong),
        failed=(*traffic.log.failed, *load.failed),
    )


class SplitGaps(NamedTuple):
    """Seconds between two tokens of a stream while no prompt was computed."""

    moving: list[float]  # that have a part of a time in which experts moved
    # Of those without, the ones that have a part of the same times CONTROL_SECONDS later. A long
    # gap meets such a time more often than a short one, so that these alone compare with `moving`.
    later: list[float]
    still: list[float]  # all without


def split_gaps(
    exchanges: Sequence[Exchange], moving: Sequence[Shift], begun: float, ended: float
) -> SplitGaps:
    prompts = [(each.started, each.arrivals[0]) for each in exchanges if each.arrivals]
    moves = [(shift.begun, shift.ended) for shift in moving]
    later = [(begin + CONTROL_SECONDS, end + CONTROL_SECONDS) for begin, end in moves]
    gaps = SplitGaps([], [], [])
    for exchange in exchanges:
        for gap in exchange.gaps:
            if gap[0] < begun or gap[1] > ended or _meets(gap, prompts):
                continue
            seconds = gap[1] - gap[0]
            if _meets(gap, moves):
                gaps.moving.append(seconds)
                continue
            gaps.still.append(seconds)
            if _meets(gap, later):
                gaps.later.append(seconds)
    return gaps


def _meets(span: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    return any(span[0] < end and span[1] > begin for begin, end in others)


def _drift(
    start: float,
    until: float,
    begun: float,
    found: Sequence[Balanced],
    moving: Sequence[Shift],
    bound: float,
) -> Drift:
    since = [each for each in found if start <= each.at < until]
    settled = [each.balance for each in since if each.at >= until - KEPT_SECONDS]
    return Drift(
        at_seconds=start - begun,
        balance_at_once=min((each.balance for each in since), default=0.0),
        seconds_to_target=seconds_until_kept(since, start, TARGET),
        settled_balance=statistics.fmean(settled) if settled else 0.0,
        num_moves=sum(shift.num_moves for shift in moving if start <= shift.begun < until),
        bound=bound,
    )


def _bound(
    drawn: DriftingExperts, model: ModelConfig, settings: Settings, num_replicas: int
) -> float:
    balance = BalanceSettings(redundancy=settings.cluster.expert_redundancy)
    max_copies = balance.max_copies(model.n_routed_experts)
    return balance_bound(drawn.share_of_rows(), num_replicas, max_copies)


async def _read(client: Client, counted: list[Counted]) -> None:
    """What the routers have sent to each replica, again and again."""
    while True:
        pairs: dict[str, int] = {}
        for member in (await client.topology()).members:
            for link in member.stats.router.replicas:
                pairs[link.address] = pairs.get(link.address, 0) + link.pairs
        counted.append(Counted(time.monotonic(), pairs))
        await asyncio.sleep(READ_SECONDS)


async def _told(
    until: float, counted: list[Counted], number: int, streams: asyncio.Task[None]
) -> None:
    while (left := until - time.monotonic()) > 0:
        await asyncio.wait([streams], timeout=min(left, 10.0))  # it ends only by failing
        if streams.done():
            return
        if found := balances(counted):
            _tell(f"drift {number}: balance {found[-1].balance:.3f}")


@asynccontextmanager
async def _beside(*work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """These run meanwhile; one that fails ends all."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()


async def _router_address(client: Client) -> str:
    topology = await client.topology()
    return next(m.address for m in topology.members if m.role == Role.ROUTER)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
