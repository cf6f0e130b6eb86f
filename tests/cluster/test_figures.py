"""A deployment's reports as figures, and these as tables."""

from dataclasses import replace

import pytest

from cluster.figure_tables import autoscale_table, figure_tables
from cluster.figures import ExpertLoad, HotExpert, figures
from cluster.readings import Windows
from protos.attention_pb2 import AttentionStatsResponse
from protos.control_pb2 import Autoscaled, GatewayStats, Member, RoleStats
from protos.expert_pb2 import ExpertStatsResponse
from protos.router_pb2 import RouterReplicaStats, RouterStatsResponse
from services.histogram import Histogram


def times(*seconds: float) -> "Histogram":
    histogram = Histogram()
    for each in seconds:
        histogram.observe(each)
    return histogram


def expert(number: int, group: int, seconds: float, busy: float, pairs: int) -> Member:
    compute = times(*[0.002] * pairs)
    stats = ExpertStatsResponse(busy_seconds=busy, pairs=pairs, compute_seconds=compute.to_wire())
    return Member(
        name=f"expert-{group}-{number}",
        role="expert",
        expert_group=group,
        address=f"host:{group}{number}",
        pid=10 * group + number,
        state="ready",
        stats=RoleStats(seconds=seconds, expert=stats),
    )


def link(address: str, answers: Histogram, **changes: float) -> RouterReplicaStats:
    return RouterReplicaStats(address=address, answer_seconds=answers.to_wire(), **changes)  # type: ignore[arg-type]


def deployment(scale: int) -> list[Member]:
    """After `scale` equal spans of 10 s each."""
    seconds = 10.0 * scale
    router = RouterStatsResponse(
        calls=20 * scale,
        resent_parts=3,
        hedged_parts=2,
        hedges_won=1,
        calls_waiting=4,
        expert_pairs=[60 * scale, 0, 30 * scale, 10 * scale],
        replicas=[
            link("host:00", times(*[0.004] * scale), slowness=1.0),
            link(
                "host:10",
                times(*[0.04] * scale),
                slowness=7.0,
                suspect=True,
                breaks=2,
                overdue_calls=5,
            ),
        ],
    )
    router.replicas[1].overdue_calls = 5
    worker = AttentionStatsResponse(
        running_sequences=2,
        completion_tokens=50 * scale,
        steps=10 * scale,
        overlapped_steps=4 * scale,
        filled_seconds=4.0 * scale,
        step_seconds=times(*[0.9] * 10 * scale).to_wire(),
    )
    gateway = GatewayStats(
        received_requests=5 * scale, finished_requests=4 * scale, active_requests=scale
    )
    return [
        Member(name="gateway-0", role="gateway", stats=RoleStats(seconds=seconds, gateway=gateway)),
        Member(
            name="attention-0", role="attention", stats=RoleStats(seconds=seconds, attention=worker)
        ),
        Member(name="router-0", role="router", stats=RoleStats(seconds=seconds, router=router)),
        expert(0, 0, seconds, busy=1.0 * scale, pairs=60 * scale),
        expert(0, 1, seconds, busy=5.0 * scale, pairs=40 * scale),
        Member(name="supervisor", role="supervisor"),
    ]


@pytest.mark.parametrize("before", [[], [1], [1, 2]])
def test_rates_and_times_are_those_of_the_last_window(before: list[int]) -> None:
    windows = Windows()
    for scale in before:
        figures(deployment(scale), windows)
    told = figures(deployment(len(before) + 1), windows)
    (gateway,), (worker,), (router,) = told.gateways, told.workers, told.routers
    assert gateway.requests_per_second == told.requests_per_second == 0.5
    assert gateway.first_token is None
    assert worker.tokens_per_second == 5
    assert worker.in_steps_share == pytest.approx(0.9)
    assert worker.filled_share == pytest.approx(0.4)
    assert worker.overlapped_share == 0.4
    assert worker.step is not None
    assert 0.7 <= worker.step.p50 <= worker.step.p99 <= 1
    assert router.crossings_per_second == 2
    assert (router.resent_parts, router.hedged_parts, router.hedges_won) == (3, 2, 1)
    assert (router.breaks, router.suspects, router.waiting_crossings) == (2, 1, 4)
    assert (router.overdue_calls, router.wrong_answers, router.failed_crossings) == (5, 0, 0)
    first, second = told.replicas
    assert (first.busy_share, second.busy_share) == (0.1, 0.5)
    assert first.answer is not None
    assert second.answer is not None
    assert first.answer.p99 <= 0.005 < 0.03 <= second.answer.p50
    assert (first.slowness, second.slowness) == (1.0, 7.0)
    assert told.experts.num_experts == 4
    assert told.experts.hot == (HotExpert(0, 0.6), HotExpert(2, 0.3), HotExpert(3, 0.1))
    assert told.experts.balance == pytest.approx(50 / 60)


def test_a_replica_that_is_not_ready_is_no_part_of_the_balance() -> None:
    members = deployment(1)
    dead = expert(1, 1, 10.0, busy=0, pairs=0)
    dead.state = "dead"
    assert figures([*members, dead], Windows()).experts.balance == pytest.approx(50 / 60)
    idle = expert(1, 1, 10.0, busy=0, pairs=0)
    assert figures([*members, idle], Windows()).experts.balance == pytest.approx(100 / 3 / 60)


def test_of_nothing_there_are_figures_too() -> None:
    told = figures([Member(name="router-0", role="router"), expert(0, 0, 0, 0, 0)], Windows())
    assert told.routers[0].crossings_per_second is None
    assert told.replicas[0].busy_share is None
    assert told.experts == ExpertLoad(0, (), None)
    assert "no expert was asked" in figure_tables(told)


def test_tables_fit_a_terminal_of_a_hundred_columns() -> None:
    told = figures(deployment(1), Windows())
    (worker,) = told.workers
    slow = replace(worker, first_token=worker.step, queue=worker.step, crossing=worker.step)
    text = figure_tables(replace(told, workers=(slow,)))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "hottest of 4 experts: 0 (60.0%), 2 (30.0%), 3 (10.0%)" in text
    assert "0.83" in text
    row = next(line for line in text.splitlines() if line.startswith("expert-1-0"))
    assert row.split()[1:5] == ["1", "50%", "4.0", "1.8/2.0ms"]


def test_what_scales_by_itself_is_told_with_its_last_reason() -> None:
    quiet = Autoscaled(role="attention", min_replicas=1, max_replicas=4, replicas=2)
    quiet.desired_replicas = 2
    busy = Autoscaled(
        role="expert",
        expert_group=0,
        min_replicas=1,
        max_replicas=8,
        replicas=2,
        desired_replicas=3,
        busy_share=0.95,
        queue_seconds=0.0021,
        last_change="2 -> 3: 95% busy (aim 70%)",
        last_change_age_seconds=12.3,
    )
    first, second = autoscale_table([quiet, busy]).splitlines()[1:]
    assert first.split() == ["attention", "2", "1", "to", "4", "-", "-", "-"]
    assert "2, 3 wanted" in second
    assert second.endswith("95%   2.1ms  12 s ago, 2 -> 3: 95% busy (aim 70%)")
