"""What `model1 bench dispatch` found: one value, as tables for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.bench_dispatch.hop import HOPS, HopCost
from cluster.bench_dispatch.overlap import Gain, StepCost
from cluster.bench_dispatch.replicas import Throughput
from cluster.output import text_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A part that was not asked for is None or empty. `emulated_bytes_per_second` is what emulated
    replicas read of weights."""

    machine: str
    emulated_bytes_per_second: float
    hops: Sequence[HopCost] = ()
    gains: Sequence[Gain] = ()
    costs: Sequence[StepCost] = ()
    emulated_gains: Sequence[Gain] = ()
    throughputs: Sequence[Throughput] = ()


def as_dict(report: Report) -> dict[str, Any]:
    return {
        **asdict(report),
        "hop_ratios": {each.num_rows: each.ratio for each in report.hops},
        "busy_shares": {each.micro_batches: each.busy_share for each in report.costs},
    }


def print_tables(report: Report) -> None:
    print(f"mini, bfloat16, one compute thread a role; {report.machine}")
    emulated = f"expert time emulated: {report.emulated_bytes_per_second / 1e9:g} GB/s of weights"
    if report.hops:
        _print_hops(report.hops)
    if report.gains:
        _print_gains("2 replicas that compute, half of the experts each", report.gains)
    if report.costs:
        _print_costs(report.costs)
    if report.emulated_gains:
        _print_gains(f"2 replicas, half of the experts each; {emulated}", report.emulated_gains)
    if report.throughputs:
        _print_throughputs(report.throughputs, emulated)


def _print_hops(hops: Sequence[HopCost]) -> None:
    print(
        f"\na layer crossing ({HOPS} hops: worker, router, replicas that compute nothing, router, "
        "worker) against\nas many bytes over the same sockets and processes with nothing done to "
        "them; ms for all hops"
    )
    cells = [
        (
            str(each.num_rows),
            f"{each.num_bytes / 1024:.0f}",
            *(f"{t * 1e3:.2f}" for t in (each.crossing.p50, each.crossing.p99)),
            *(f"{t * 1e3:.2f}" for t in (each.chain.p50, each.chain.p99)),
            f"{each.ratio:.2f}x",
            f"{each.added_seconds_a_hop * 1e6:.0f}",
        )
        for each in hops
    ]
    head = ("rows", "KiB", "crossing p50", "p99", "bare p50", "p99", "ratio of p50", "added us/hop")
    print(text_table(head, cells))


def _print_gains(title: str, gains: Sequence[Gain]) -> None:
    print(f"\ndecode steps as one batch, as two micro-batches, and automatic, in turns: {title}")
    cells = [
        (
            str(each.batch),
            str(each.steps),
            *(f"{t * 1e3:.1f}" for t in (each.one, each.two, each.automatic)),
            f"{each.two_ratio:.2f}x",
            f"{each.automatic_ratio:.2f}x",
            f"{each.automatic_twos:.0%}",
        )
        for each in gains
    ]
    head = (
        *("batch", "steps", "one ms", "two ms", "auto ms"),
        *("speed of two", "speed of auto", "auto as two"),
    )
    print(text_table(head, cells))


def _print_costs(costs: Sequence[StepCost]) -> None:
    print(
        f"\ncore milliseconds of a step of {costs[0].batch} sequences (the prompts' steps "
        f"included), {costs[0].cores} cores; same tokens"
    )
    cells = [
        (
            str(each.micro_batches),
            *(f"{t * 1e3:.1f}" for t in (each.cpu.worker, each.cpu.router, each.cpu.experts)),
            *(f"{t * 1e3:.1f}" for t in (each.cpu.total, each.seconds, each.wait_seconds)),
            f"{each.busy_share:.0%}",
        )
        for each in costs
    ]
    head = ("batches", "worker", "router", "experts", "all", "step ms", "waiting ms", "cores busy")
    print(text_table(head, cells))


def _print_throughputs(throughputs: Sequence[Throughput], emulated: str) -> None:
    print(f"\ncrossings of 32 rows through one router, 16 under way; {emulated}")
    cells = [
        (str(each.num_replicas), f"{each.crossings_per_second:.1f}", f"{each.of_linear:.2f}")
        for each in throughputs
    ]
    print(text_table(("replicas", "crossings/s", "of linear"), cells))
