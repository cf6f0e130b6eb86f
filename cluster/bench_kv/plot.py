"""The two curves of the benchmark as a picture: time against length, and time against memory."""

from pathlib import Path

from cluster.bench_kv.report import Report
from cluster.figure import Axes, figure


def write_plot(report: Report, path: Path) -> None:
    with figure(path, num_rows=1, num_columns=2) as (left, right):
        _draw_resumed(report, left)
        _draw_budgets(report, right)


def _draw_resumed(report: Report, axes: Axes) -> None:
    if report.resumed:
        nearest = [each for each in report.resumed if each.tier == report.tiers[0]]
        lengths = [each.history_tokens for each in nearest]
        axes.plot(lengths, [each.computed_seconds for each in nearest], "k--", label="computed")
        for tier in report.tiers:
            of_tier = [each for each in report.resumed if each.tier == tier]
            axes.plot(lengths, [each.seconds for each in of_tier], marker="o", label=f"from {tier}")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of history",
            ylabel="seconds to the first token",
        )
        axes.set_title("Resuming a session")
        axes.legend()


def _draw_budgets(report: Report, axes: Axes) -> None:
    if report.budgets:
        saved = [100 * each.saved for each in report.budgets]
        axes.plot(saved, [each.ratio for each in report.budgets], marker="o")
        axes.axhline(1.1, color="grey", linestyle=":", label="1.10x")
        axes.set(xlabel="% of device KV bytes given back", ylabel="time per token, relative")
        axes.set_ylim(0, 1.3 * max(1.1, *(each.ratio for each in report.budgets)))
        axes.set_title("The same sessions on less device memory")
        axes.legend(loc="lower right")
