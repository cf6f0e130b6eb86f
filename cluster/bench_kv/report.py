"""What `model1 bench kv` found: one value, as tables for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.bench_kv.bandwidth import Bandwidths
from cluster.bench_kv.budget import Budget, Load
from cluster.bench_kv.no_reuse import NoReuse
from cluster.bench_kv.resume import Resumed, break_even
from cluster.output import text_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A part that was not asked for is None or empty."""

    machine: str
    load: Load
    budgets: Sequence[Budget] = ()
    resumed: Sequence[Resumed] = ()
    bandwidths: Sequence[Bandwidths] = ()
    no_reuse: NoReuse | None = None

    @property
    def tiers(self) -> list[str]:
        """That were resumed from, the fastest first."""
        return list(dict.fromkeys(each.tier for each in self.resumed))


def as_dict(report: Report) -> dict[str, Any]:
    ratios = {"resumed": [each.ratio for each in report.resumed]}
    break_evens = {tier: break_even(report.resumed, tier) for tier in report.tiers}
    return {**asdict(report), "ratios": ratios, "break_even_tokens": break_evens}


def print_tables(report: Report) -> None:
    print(f"mini, bfloat16, one compute thread; {report.machine}")
    if report.budgets:
        _print_budgets(report.budgets, report.load)
    if report.resumed:
        _print_resumed(report)
    for each in report.bandwidths:
        _print_bandwidths(each)
    if report.no_reuse is not None:
        _print_no_reuse(report.no_reuse)


def _print_budgets(budgets: Sequence[Budget], load: Load) -> None:
    print(
        f"\ndevice memory of the same {load.sessions} sessions of {load.history_tokens} tokens, "
        "2 active at once; identical tokens"
    )
    print(
        text_table(
            ["device KV", "saved", "CSA entries", "time per token", "ratio", "first token"],
            [
                [
                    f"{each.device_bytes / 2**20:.1f} MiB",
                    f"{each.saved:.0%}",
                    "device" if each.hot_entries is None else f"host, {each.hot_entries} hot",
                    f"{each.seconds_per_token * 1e3:.1f} ms",
                    f"{each.ratio:.2f}",
                    f"{each.first_token_seconds * 1e3:.0f} ms",
                ]
                for each in budgets
            ],
        )
    )


def _print_resumed(report: Report) -> None:
    print("\ntime to first token of a session's next turn, on a worker that never saw it")
    print(
        text_table(
            ["history", "computed", *(f"from {tier}" for tier in report.tiers)],
            [
                [
                    f"{length} tokens",
                    f"{row[0].computed_seconds * 1e3:.0f} ms",
                    *(f"{each.seconds * 1e3:.0f} ms ({each.ratio:.1f}x)" for each in row),
                ]
                for length, row in _by_length(report.resumed).items()
            ],
        )
    )
    for tier in report.tiers:
        even = break_even(report.resumed, tier)
        print(f"from {tier}: faster than computing from {even} tokens on, of the lengths above")


def _print_bandwidths(found: Bandwidths) -> None:
    print(
        f"\n{found.history_tokens} tokens of history in {found.num_blobs} blobs, "
        f"{found.blob_bytes / 2**20:.1f} MiB; the checksum alone runs at "
        f"{found.checksum_bytes_per_second / 1e9:.1f} GB/s a core"
    )
    print(
        text_table(
            ["tier", "ours, verified", "plain", "ratio", "verification's share"],
            [
                [
                    each.tier,
                    f"{each.ours / 1e9:.2f} GB/s",
                    f"{each.plain / 1e9:.2f} GB/s",
                    f"{each.ratio:.2f}",
                    f"{each.verify_share:.0%}",
                ]
                for each in found.tiers
            ],
        )
    )


def _print_no_reuse(found: NoReuse) -> None:
    print(
        f"\n{found.num_requests} prompts that share nothing: time to first token p95 "
        f"{found.with_tiers_p95 * 1e3:.0f} ms with tiers, {found.without_p95 * 1e3:.0f} ms "
        f"without: {found.ratio_p95:.3f}x (median of the pairs {found.ratio_median:.3f}x)"
    )


def _by_length(resumed: Sequence[Resumed]) -> dict[int, list[Resumed]]:
    rows: dict[int, list[Resumed]] = {}
    for each in resumed:
        rows.setdefault(each.history_tokens, []).append(each)
    return rows
