"""What a run showed: as tables for people, and as plain values for programs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from cluster.chaos.plan import Fault
from cluster.chaos.presets import PRESETS
from cluster.chaos.stalls import normal_gap, percentile, stalls
from cluster.chaos.verdicts import Report, Verdict
from cluster.output import text_table

SHOWN_FAILURES = 10


def verdicts(report: Report) -> Sequence[Verdict]:
    """Of a run that was to show something."""
    preset = PRESETS.get(report.preset)
    return [judge(report) for judge in preset.judges] if preset else []


def as_dict(report: Report) -> dict[str, object]:
    log = report.log
    return {
        "machine": report.machine,
        "preset": report.preset,
        "seed": report.seed,
        "streams": report.streams,
        "seconds": report.seconds,
        "requests": report.num_requests,
        "tokens": log.num_tokens,
        "tokens_per_second": log.num_tokens / report.seconds,
        "wrong": log.wrong,
        "failed": log.failed,
        "not_recovered": report.not_recovered,
        "normal_gap_seconds": normal_gap(log.exchanges),
        "faults": {
            row.fault: {
                "count": row.count,
                "stall_seconds_p50": row.stall_p50,
                "stall_seconds_p99": row.stall_p99,
                "stall_seconds_max": row.stall_max,
                "stalls": row.num_stalls,
                "recovery_seconds_max": row.recovery_max,
            }
            for row in _rows(report)
        },
        "counts": asdict(report.counts),
        "verdicts": [asdict(verdict) for verdict in verdicts(report)],
        "rss_mib_per_minute": dict(report.rss_mib_per_minute),
    }


def print_tables(report: Report) -> None:
    log = report.log
    print(
        f"{report.machine}\n"
        f"{report.preset or 'all faults'}, seed {report.seed}, {report.streams} streams, "
        f"{report.seconds:.0f} s: {report.num_requests} requests, {log.num_tokens} tokens, "
        f"{log.num_tokens / report.seconds:.0f} tokens/s, "
        f"{normal_gap(log.exchanges) * 1e3:.0f} ms between two tokens\n"
        f"{len(log.wrong)} wrong, {len(log.failed)} failed"
        + ("" if log.wrong or log.failed else f" (95% bound {3 / max(1, report.num_requests):.1e})")
        + "\n"
    )
    rows = [
        (
            row.fault,
            row.count,
            f"{row.stall_p50 * 1e3:.0f}",
            f"{row.stall_p99 * 1e3:.0f}",
            f"{row.stall_max * 1e3:.0f}",
            f"{row.recovery_max:.1f} s",
        )
        for row in _rows(report)
    ]
    header = ("fault", "times", "stall ms p50", "p99", "longest", "whole again after at most")
    print(text_table(header, rows))
    if told := verdicts(report):
        met = {True: "yes", False: "no", None: ""}
        judged = [(each.what, each.measured, each.target, met[each.is_met]) for each in told]
        print("\n" + text_table(("what", "measured", "target", "met"), judged))
    slopes = ((name, f"{slope:+.2f}") for name, slope in report.rss_mib_per_minute.items())
    print("\n" + text_table(("memory of", "MiB a minute"), list(slopes)))
    for kind, lines in (("wrong", log.wrong), ("failed", log.failed)):
        for line, times in Counter(lines).most_common(SHOWN_FAILURES):
            print(f"{kind}, {times} times: {line}")
    if report.not_recovered:
        print(f"ended early: {report.not_recovered}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    fault: Fault
    count: int
    num_stalls: int
    stall_p50: float
    stall_p99: float
    stall_max: float
    recovery_max: float


def _rows(report: Report) -> Iterator[_Row]:
    found = stalls(report.log.exchanges, report.faults)
    for fault in Fault:
        happened = report.of(fault)
        if not happened:
            continue
        seconds = [stall.seconds for stall in found if stall.fault is fault] or [0.0]
        yield _Row(
            fault=fault,
            count=len(happened),
            num_stalls=len(seconds),
            stall_p50=percentile(seconds, 0.5),
            stall_p99=percentile(seconds, 0.99),
            stall_max=max(seconds),
            recovery_max=max(each.recovered - each.at for each in happened),
        )
