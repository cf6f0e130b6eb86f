"""The two curves of the benchmark as a picture: time against length, and time against memory."""

from pathlib import Path

from cluster.bench_kv.report import Report
from cluster.config import SettingsError


def require_plot(path: Path) -> None:
    """Raises `SettingsError` if there can be none, before minutes are spent on measuring."""
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"--plot: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SettingsError(
            "--plot needs matplotlib, which is not installed: pip install 'model1[dev]'"
        ) from None


def write_plot(report: Report, path: Path) -> None:
    """SVG, PNG or what else the name's suffix asks for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if report.resumed:
        nearest = [each for each in report.resumed if each.tier == report.tiers[0]]
        lengths = [each.history_tokens for each in nearest]
        left.plot(lengths, [each.computed_seconds for each in nearest], "k--", label="computed")
        for tier in report.tiers:
            of_tier = [each for each in report.resumed if each.tier == tier]
            left.plot(lengths, [each.seconds for each in of_tier], marker="o", label=f"from {tier}")
        left.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of history",
            ylabel="seconds to the first token",
        )
        left.set_title("Resuming a session")
        left.legend()
    if report.budgets:
        saved = [100 * each.saved for each in report.budgets]
        right.plot(saved, [each.ratio for each in report.budgets], marker="o")
        right.axhline(1.1, color="grey", linestyle=":", label="1.10x")
        right.set(xlabel="% of device KV bytes given back", ylabel="time per token, relative")
        right.set_ylim(0, 1.3 * max(1.1, *(each.ratio for each in report.budgets)))
        right.set_title("The same sessions on less device memory")
        right.legend(loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)
