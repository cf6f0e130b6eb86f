"""What a run came to beside what it was meant to come to. Plain values."""

import statistics
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.chaos.faults import Injected
from cluster.chaos.plan import Fault
from cluster.chaos.stalls import normal_gap, percentile, stalls
from cluster.chaos.traffic import Log


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the deployment counted during the run."""

    continuations: int = 0
    recomputed_tokens: int = 0
    # Of the attention workers: blocks of 128 tokens on the device before the first fault, and how
    # many of those were not there any more after the last.
    blocks_before: int = 0
    blocks_lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`rss_mib_per_minute` is by process."""

    machine: str
    preset: str
    seed: int
    streams: int
    seconds: float
    log: Log
    faults: Sequence[Injected]
    not_recovered: str  # why the run ended early; empty: it did not
    rss_mib_per_minute: Mapping[str, float]
    counts: Counts = Counts()

    @property
    def is_good(self) -> bool:
        return not (self.log.wrong or self.log.failed or self.not_recovered)

    @property
    def num_requests(self) -> int:
        return self.log.num_answered + len(self.log.wrong) + len(self.log.failed)

    def of(self, fault: Fault) -> list[Injected]:
        return [each for each in self.faults if each.fault is fault]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`is_met` is None where nothing was promised."""

    what: str
    measured: str
    target: str
    is_met: bool | None


def stall(fault: Fault, share: float, target_seconds: float | None) -> Callable[[Report], Verdict]:
    """Of all streams at all faults of the kind."""

    def judge(report: Report) -> Verdict:
        found = stalls(report.log.exchanges, report.faults)
        seconds = percentile(
            [each.seconds for each in found if each.fault is fault] or [0.0], share
        )
        what = f"stall after {fault}, p{100 * share:g}"
        return _at_most(what, seconds, target_seconds)

    return judge


def longest_gap(floor_seconds: float, *, steps: float) -> Callable[[Report], Verdict]:
    """Between two tokens of a stream: at most so many usual ones, or the floor if that is more."""

    def judge(report: Report) -> Verdict:
        gaps = [end - begin for begin, end in _gaps(report)]
        target = max(floor_seconds, steps * normal_gap(report.log.exchanges))
        return _at_most("longest time between two tokens", max(gaps, default=0.0), target)

    return judge


def recovery(fault: Fault, target_seconds: float | None) -> Callable[[Report], Verdict]:
    """Until every member is ready again, at most."""

    def judge(report: Report) -> Verdict:
        seconds = [each.recovered - each.at for each in report.of(fault)]
        return _at_most(f"whole again after {fault}", max(seconds, default=0.0), target_seconds)

    return judge


def slowed_tail(settle_seconds: float, *, factor: float) -> Callable[[Report], Verdict]:
    """The p99 of gaps while a replica is slow, once others had that long to notice, beside that of
    the times when none is."""

    def judge(report: Report) -> Verdict:
        slow = [(each.at + settle_seconds, each.ended) for each in report.of(Fault.SLOW_EXPERT)]
        disturbed = [(each.at, each.ended + settle_seconds) for each in report.faults]
        then = [e - b for b, e in _gaps(report) if any(x <= b and e <= y for x, y in slow)]
        steady = [e - b for b, e in _gaps(report) if not any(b < y and e > x for x, y in disturbed)]
        ratio = percentile(then or [0.0], 0.99) / max(percentile(steady or [1.0], 0.99), 1e-9)
        return Verdict(
            f"p99 between two tokens from {settle_seconds:g} s after a replica became slow, beside "
            "the undisturbed",
            f"{ratio:.2f}x",
            f"{factor:g}x",
            ratio <= factor if then and steady else False,
        )

    return judge


def throughput(target: float) -> Callable[[Report], Verdict]:
    """While a replica is dead, beside the equally long time before: the median of the pairs."""

    def judge(report: Report) -> Verdict:
        ends = sorted(end for _, end in _gaps(report))
        ratios = []
        for each in report.of(Fault.HOLD_EXPERT_DEAD):
            seconds = each.ended - each.at
            before = bisect(ends, each.at) - bisect(ends, each.at - seconds)
            ratios.append((bisect(ends, each.ended) - bisect(ends, each.at)) / max(1, before))
        ratio = statistics.median(ratios) if ratios else 0.0
        told = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        return Verdict(
            f"tokens/s with a dead replica, beside those before (pairs: {told})",
            f"{ratio:.3f}x",
            f"{target:g}x",
            ratio >= target,
        )

    return judge


def recomputed(report: Report) -> Verdict:
    """By workers that went on with another one's request; what is not in the KV tiers at that
    moment is at most one block and what was not written back yet."""
    counts = report.counts
    mean = counts.recomputed_tokens / max(1, counts.continuations)
    return Verdict(
        f"tokens computed again in each of {counts.continuations} continuations",
        f"{mean:.0f}",
        "128 and what was not written back",
        None,
    )


def kept_blocks(report: Report) -> Verdict:
    counts = report.counts
    return Verdict(
        f"KV blocks lost, of {counts.blocks_before} that attention workers had",
        f"{counts.blocks_lost}",
        "0",
        counts.blocks_before > 0 and counts.blocks_lost == 0,
    )


def _at_most(what: str, seconds: float, target_seconds: float | None) -> Verdict:
    if target_seconds is None:
        return Verdict(what, f"{seconds * 1e3:.0f} ms", "reported", None)
    is_met = seconds <= target_seconds
    return Verdict(what, f"{seconds * 1e3:.0f} ms", f"{target_seconds * 1e3:.0f} ms", is_met)


def _gaps(report: Report) -> Iterator[tuple[float, float]]:
    for exchange in report.log.exchanges:
        yield from exchange.gaps
