"""A deployment in figures: what its members did within a window of each, and what holds it up.

From the members' reports to plain values; how they are laid out is figure_tables.py's. Times are in
seconds. None: nothing of the kind happened, or a member did not say.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.members import MemberState
from cluster.readings import Reading, Window, Windows, answers_of
from cluster.topology import Role
from protos import control_pb2
from services.histogram import Histogram, added

NUM_HOT_EXPERTS = 5

Members = Sequence[control_pb2.Member]


@dataclass(frozen=True, slots=True)
class Latency:
    p50: float
    p99: float

    @classmethod
    def of(cls, histogram: Histogram) -> "Latency | None":
        p50, p99 = histogram.percentile(0.5), histogram.percentile(0.99)
        return None if p50 is None or p99 is None else cls(round(p50, 7), round(p99, 7))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFigures:
    """Counts since the process started, the rest within the window."""

    name: str
    requests_per_second: float | None
    tokens_per_second: float | None
    first_token: Latency | None  # since the request came in
    active: int
    finished: int
    cancelled: int
    rejected: int
    failed: int
    waits: int
    continuations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFigures:
    name: str
    running: int
    waiting: int
    tokens_per_second: float | None
    in_steps_share: float | None  # of its time
    filled_share: float | None  # of what fits into steps, all the time
    queue: Latency | None  # from acceptance to the first step
    first_token: Latency | None  # from acceptance
    step: Latency | None
    overlapped_share: float | None  # of the steps: those that ran as two micro-batches
    crossing: Latency | None  # of a layer: rows to the router, their sum back
    crossing_wait: Latency | None  # the part of it without anything to compute


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFigures:
    """Rates and times within the window; counts since the process started."""

    name: str
    crossings_per_second: float | None
    answer: Latency | None  # of any replica
    resent_parts: int
    hedged_parts: int
    hedges_won: int
    probe_parts: int
    breaks: int  # of streams to the replicas of now
    overdue_calls: int
    wrong_answers: int
    suspects: int  # replicas that are passed over now
    waiting_crossings: int  # now, for a replica that takes their rows
    failed_crossings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFigures:
    name: str
    group: int
    busy_share: float | None
    pairs_per_second: float | None
    compute: Latency | None
    answer: Latency | None  # as the routers see it
    slowness: float | None  # as the router sees it that thinks the worst of it; 1 is typical
    late_calls: int
    failed_calls: int


@dataclass(frozen=True, slots=True)
class HotExpert:
    expert: int
    share: float  # of all pairs


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Of (row, expert) pairs within the window."""

    num_experts: int
    hot: tuple[HotExpert, ...]  # hottest first
    balance: float | None  # mean over largest load of the ready replicas; 1 is even


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    gateways: tuple[GatewayFigures, ...]
    workers: tuple[WorkerFigures, ...]
    routers: tuple[RouterFigures, ...]
    replicas: tuple[ReplicaFigures, ...]
    experts: ExpertLoad

    @property
    def requests_per_second(self) -> float:
        return sum(gateway.requests_per_second or 0.0 for gateway in self.gateways)


def figures(members: Iterable[control_pb2.Member], windows: Windows) -> Figures:
    """Of the time since these windows were asked last, or since each process serves."""
    ordered = sorted(members, key=lambda member: (len(member.name), member.name))
    readings = {member.name: Reading(member.pid, member.stats) for member in ordered}
    seen = windows.until(readings)

    def of(role: Role) -> list[control_pb2.Member]:
        return [member for member in ordered if member.role == role]

    routers = [seen[member.name] for member in of(Role.ROUTER)]
    return Figures(
        gateways=tuple(_gateway(m.name, seen[m.name]) for m in of(Role.GATEWAY)),
        workers=tuple(_worker(m.name, seen[m.name]) for m in of(Role.ATTENTION)),
        routers=tuple(_router(m.name, seen[m.name]) for m in of(Role.ROUTER)),
        replicas=tuple(_replica(m, seen[m.name], routers) for m in of(Role.EXPERT)),
        experts=_expert_load(routers, of(Role.EXPERT), seen),
    )


def _gateway(name: str, window: Window) -> GatewayFigures:
    now = window.now.gateway
    return GatewayFigures(
        name=name,
        requests_per_second=window.rate(lambda stats: stats.gateway.received_requests),
        tokens_per_second=window.rate(lambda stats: stats.gateway.generated_tokens),
        first_token=Latency.of(window.histogram(lambda stats: stats.gateway.first_token_seconds)),
        active=now.active_requests,
        finished=now.finished_requests,
        cancelled=now.cancelled_requests,
        rejected=now.rejected_requests,
        failed=now.failed_requests,
        waits=now.waits,
        continuations=now.continuations,
    )


def _worker(name: str, window: Window) -> WorkerFigures:
    now = window.now.attention
    return WorkerFigures(
        name=name,
        running=now.running_sequences,
        waiting=now.waiting_sequences,
        tokens_per_second=window.rate(lambda stats: stats.attention.completion_tokens),
        in_steps_share=window.rate(lambda stats: stats.attention.step_seconds.sum_seconds),
        filled_share=window.rate(lambda stats: stats.attention.filled_seconds),
        queue=Latency.of(window.histogram(lambda stats: stats.attention.queue_seconds)),
        first_token=Latency.of(window.histogram(lambda stats: stats.attention.first_token_seconds)),
        step=Latency.of(window.histogram(lambda stats: stats.attention.step_seconds)),
        overlapped_share=window.count(lambda stats: stats.attention.overlapped_steps) / steps
        if (steps := window.count(lambda stats: stats.attention.steps))
        else None,
        crossing=Latency.of(window.histogram(lambda stats: stats.attention.crossing_seconds)),
        crossing_wait=Latency.of(
            window.histogram(lambda stats: stats.attention.crossing_wait_seconds)
        ),
    )


def _router(name: str, window: Window) -> RouterFigures:
    now = window.now.router
    return RouterFigures(
        name=name,
        crossings_per_second=window.rate(lambda stats: stats.router.calls),
        answer=Latency.of(answers_of(window)),
        resent_parts=now.resent_parts,
        hedged_parts=now.hedged_parts,
        hedges_won=now.hedges_won,
        probe_parts=now.probe_parts,
        breaks=sum(link.breaks for link in now.replicas),
        overdue_calls=sum(link.overdue_calls for link in now.replicas),
        wrong_answers=sum(link.wrong_answers for link in now.replicas),
        suspects=sum(link.suspect for link in now.replicas),
        waiting_crossings=now.calls_waiting,
        failed_crossings=now.failed_calls,
    )


def _replica(
    member: control_pb2.Member, window: Window, routers: Sequence[Window]
) -> ReplicaFigures:
    now = window.now.expert
    links = [
        link
        for router in routers
        for link in router.now.router.replicas
        if link.address == member.address
    ]
    return ReplicaFigures(
        name=member.name,
        group=member.expert_group,
        busy_share=window.rate(lambda stats: stats.expert.busy_seconds),
        pairs_per_second=window.rate(lambda stats: stats.expert.pairs),
        compute=Latency.of(window.histogram(lambda stats: stats.expert.compute_seconds)),
        answer=Latency.of(added(answers_of(router, [member.address]) for router in routers)),
        slowness=max((link.slowness for link in links), default=None),
        late_calls=now.late_calls,
        failed_calls=now.failed_calls,
    )


def _expert_load(
    routers: Sequence[Window], replicas: Members, windows: Mapping[str, Window]
) -> ExpertLoad:
    def pairs(read: Callable[[Window], control_pb2.RoleStats]) -> NDArray[np.int64]:
        counts = [read(router).router.expert_pairs for router in routers]
        longest = max((len(each) for each in counts), default=0)
        total = np.zeros(longest, dtype=np.int64)
        for each in counts:
            total[: len(each)] += np.array(each, dtype=np.int64)
        return total

    now, then = pairs(lambda window: window.now), pairs(lambda window: window.then)
    now[: len(then)] -= then
    hottest = np.argsort(-now, kind="stable")[:NUM_HOT_EXPERTS]
    hot = tuple(HotExpert(int(i), float(now[i] / now.sum())) for i in hottest if now[i] > 0)
    loads = [
        windows[member.name].count(lambda stats: stats.expert.pairs)
        for member in replicas
        if member.state == MemberState.READY
    ]
    largest = max(loads, default=0.0)
    return ExpertLoad(len(now), hot, sum(loads) / len(loads) / largest if largest > 0 else None)
