"""What the benchmark showed: as tables for people, and as plain values for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster.chaos.stalls import percentile
from cluster.output import text_table

TARGET = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What followed one change of the hot experts, until the next. Balances are those of windows of
    some seconds, chance included."""

    at_seconds: float
    balance_at_once: float  # the lowest until it was reached, or of all
    seconds_to_target: float | None  # until it was reached and kept
    settled_balance: float  # the mean of the last ten seconds
    num_moves: int
    bound: float  # that no placement with as many copies exceeds


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between two tokens of a stream."""

    count: int
    p50: float
    p90: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Gaps":
        values = seconds or [0.0]
        p50, p90, p99 = (percentile(values, fraction) for fraction in (0.5, 0.9, 0.99))
        return cls(len(seconds), p50, p90, p99, max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    machine: str
    seed: int
    num_experts: int
    topk: int
    num_replicas: int
    redundancy: float
    exponent: float
    num_hot: int
    pairs_per_second: float
    drifts: tuple[Drift, ...]
    moving_seconds: float  # in all
    gaps_moving: Gaps  # see SplitGaps
    gaps_later: Gaps
    gaps_still: Gaps
    num_crossings: int  # that were answered
    num_answers: int
    num_tokens: int
    wrong: tuple[str, ...]
    failed: tuple[str, ...]  # crossings and requests


def as_dict(report: Report) -> dict[str, object]:
    return asdict(report)


def print_tables(report: Report) -> None:
    print(
        f"mini, bfloat16, {report.machine}\n"
        f"{report.num_experts} experts on {report.num_replicas} replicas and"
        f" {report.redundancy:.1%} more copies; top-{report.topk} by Zipf({report.exponent:g}),"
        f" {report.pairs_per_second:,.0f} pairs/s; {report.num_hot} hot experts change places in a"
        f" drift; seed {report.seed}\n"
        "balance: mean over largest load of the replicas in 5 s; the first drift is the start\n"
    )
    header = ("drift at", "worst", f"until {TARGET}", "settled", "bound", "moves")
    rows = [
        (
            f"{drift.at_seconds:.0f} s",
            f"{drift.balance_at_once:.3f}",
            "not reached"
            if drift.seconds_to_target is None
            else f"{drift.seconds_to_target:.0f} s",
            f"{drift.settled_balance:.3f}",
            f"{drift.bound:.3f}",
            drift.num_moves,
        )
        for drift in report.drifts
    ]
    print(text_table(header, rows))
    gaps = (
        (f"while experts moved ({report.moving_seconds:.1f} s)", report.gaps_moving),
        ("in like times without moves", report.gaps_later),
        ("all without moves", report.gaps_still),
    )
    cells = []
    for name, each in gaps:
        seconds = (each.p50, each.p90, each.p99, each.longest)
        cells.append((name, each.count, *(f"{x * 1e3:.0f}" for x in seconds)))
    print()
    print(
        text_table(
            ("ms between two tokens, no prompt meanwhile", "gaps", "p50", "p90", "p99", "longest"),
            cells,
        )
    )
    print(
        f"\n{report.num_crossings} crossings; {report.num_answers} answers, {report.num_tokens}"
        f" tokens, compared with one process: {len(report.wrong)} wrong;"
        f" {len(report.failed)} failed"
    )
