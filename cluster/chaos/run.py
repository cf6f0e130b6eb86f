"""The whole of `model1 chaos run`: a deployment, known questions, traffic, faults, the report."""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, redirect_stdout

from cluster.access import access
from cluster.chaos.faults import Injected, Injector, NotRecovered
from cluster.chaos.memory import MemoryWatch, Process
from cluster.chaos.nodes import LocalNodes, local_nodes
from cluster.chaos.plan import Fault, Plan
from cluster.chaos.questions import Question, known_questions
from cluster.chaos.report import as_dict, print_tables
from cluster.chaos.traffic import Traffic
from cluster.chaos.verdicts import Counts, Report
from cluster.chaos.witness import Witness
from cluster.client import Client, RequestFailed, Unreachable, connected
from cluster.config import Settings
from cluster.deployment import Deployment, Site, deployed, prepared
from cluster.members import DeploymentError
from cluster.preflight import model_directory
from cluster.ray_session import COMPUTE_ENVIRONMENT
from cluster.serve import cancel_on_signals

NUM_QUESTIONS = 32
STEADY_SECONDS = 3.0  # before the first fault and after the last
RECOVERY_SECONDS = 90.0


class Noticed(Exception):
    """Somebody got a wrong answer or none, or the deployment did not come back."""


def chaos_run(settings: Settings, plan: Plan, *, as_json: bool) -> None:
    """Raises `Noticed` after the report."""
    os.environ.update(COMPUTE_ENVIRONMENT)  # of all processes, and before torch is imported
    from model1.bench import machine

    _tell(f"seed {plan.seed}")
    questions = known_questions(
        model_directory(settings.model),
        dtype=settings.model.dtype,
        count=NUM_QUESTIONS,
        seed=plan.seed,
        told=_tell,
    )
    _tell("starting Ray")
    # Ray reports the death of a worker on stdout, which is for the report.
    with (
        redirect_stdout(sys.stderr),
        _nodes(settings, plan) as (nodes, settings_there),
        prepared(settings_there) as site,
    ):
        report = asyncio.run(_run(site, nodes, plan, questions, machine()))
    if as_json:
        print(json.dumps(as_dict(report)))
    else:
        print_tables(report)
    if not report.is_good:
        raise Noticed(
            f"{len(report.log.wrong)} wrong answers, {len(report.log.failed)} failed requests"
            + (f"; {report.not_recovered}" if report.not_recovered else "")
            + f"; again with --seed {plan.seed}"
        )


@contextmanager
def _nodes(settings: Settings, plan: Plan) -> Iterator[tuple[LocalNodes | None, Settings]]:
    """The nodes of a run that needs more than one, and the settings to run there."""
    if plan.num_nodes == 1:
        yield None, settings
        return
    with local_nodes(plan.num_nodes) as nodes:
        cluster = settings.cluster.model_copy(update={"ray_address": nodes.address})
        yield nodes, settings.model_copy(update={"cluster": cluster})


async def _run(
    site: Site,
    nodes: LocalNodes | None,
    plan: Plan,
    questions: Sequence[Question],
    machine: str,
) -> Report:
    cancel_on_signals()
    _tell("starting the actors")
    async with (
        deployed(site) as deployment,
        _watched(deployment),
        connected(access(site.settings, deployment.endpoint)) as client,
    ):
        traffic = Traffic(client.channel, questions, streams=plan.streams, seed=plan.seed)
        witness = Witness(client.channel, questions)
        memory = MemoryWatch()
        begun = time.monotonic()
        not_recovered = ""
        done: list[Injected] = []
        async with _running(memory, client), asyncio.TaskGroup() as group:
            group.create_task(traffic.run())
            try:
                await _inject_all(client, nodes, plan, traffic, witness, done)
            except NotRecovered as error:
                not_recovered = str(error)
            finally:
                traffic.stop()
        seconds = time.monotonic() - begun
        counts = await _counts(client, witness)
    return Report(
        machine=machine,
        preset=plan.preset,
        seed=plan.seed,
        streams=plan.streams,
        seconds=seconds,
        log=traffic.log,
        faults=done,
        not_recovered=not_recovered,
        rss_mib_per_minute=memory.slopes(),
        counts=counts,
    )


async def _counts(client: Client, witness: Witness) -> Counts:
    gateways = [each.stats.gateway for each in (await client.topology()).members]
    return Counts(
        continuations=sum(gateway.continuations for gateway in gateways),
        recomputed_tokens=sum(gateway.recomputed_tokens for gateway in gateways),
        blocks_before=witness.num_blocks,
        blocks_lost=witness.num_lost,
    )


async def _inject_all(
    client: Client,
    nodes: LocalNodes | None,
    plan: Plan,
    traffic: Traffic,
    witness: Witness,
    done: list[Injected],
) -> None:
    draw = random.Random(f"plan {plan.seed}")
    injector = Injector(client, nodes, seed=plan.seed, patience_seconds=RECOVERY_SECONDS)
    until = time.monotonic() + plan.seconds
    # Where nothing happens to the workers they keep what they have.
    is_watched = set(plan.faults) == {Fault.SCALE_EXPERTS}
    if is_watched:
        await witness.begin()
    await asyncio.sleep(STEADY_SECONDS)
    while time.monotonic() < until and len(done) != plan.max_faults:
        fault = draw.choice(plan.faults)
        done.append(injected := await injector.inject(fault))
        if is_watched:
            await witness.look()
        log = traffic.log
        _tell(
            f"{len(done)}: {fault} {injected.target}, whole again after "
            f"{injected.recovered - injected.at:.1f} s; {log.num_answered} answered, "
            f"{len(log.wrong)} wrong, {len(log.failed)} failed"
        )
        pause = draw.uniform(0.0, plan.pause_seconds)
        await asyncio.sleep(min(pause, max(0.0, until - time.monotonic())))
    await asyncio.sleep(STEADY_SECONDS)


@asynccontextmanager
async def _watched(deployment: Deployment) -> AsyncIterator[None]:
    """The supervisor heals what dies, as in `model1 serve`."""
    watching = asyncio.create_task(_watch(deployment))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def _watch(deployment: Deployment) -> None:
    why = await deployment.supervisor.watch()
    _tell(f"the deployment cannot serve any more: {why}")


@asynccontextmanager
async def _running(memory: MemoryWatch, client: Client) -> AsyncIterator[None]:
    processes: tuple[Process, ...] = ()

    async def living() -> Iterable[Process]:
        nonlocal processes
        with contextlib.suppress(Unreachable, RequestFailed, DeploymentError):
            topology = await client.topology()
            processes = tuple(Process(member.name, member.pid) for member in topology.members)
        return processes

    sampling = asyncio.create_task(memory.run(living))
    try:
        yield
    finally:
        sampling.cancel()
        await asyncio.wait([sampling])


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
