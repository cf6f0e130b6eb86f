"""`model1 plan autoscale`: what the scaling policy saves against a fleet sized for the peak."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.figure import figure, require_plot
from cluster.output import text_table
from cluster.plan.fleet import FleetRun, FleetScenario, arrivals, run_fixed, run_scaled
from cluster.plan.load_curves import LoadCurve, read_curve, synthetic_curves

HEADER = (
    *("load", "hours", "fixed fleet", "replica-hours", "of fixed", "over target", "of fixed's"),
    *("longest wait", "changes", "most"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The policy on one load beside a fleet as large as the largest rate needs."""

    load: str
    hours: float
    fixed_replicas: int
    replica_hours: float
    fixed_replica_hours: float
    over_target: float  # share of the time in which requests wait longer than they should
    fixed_over_target: float
    longest_wait_seconds: float
    num_changes: int
    most_replicas: int


def plan_autoscale(
    scenario: FleetScenario,
    *,
    trace: Path | None,
    peak: float,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Seconds for days of simulated time. Raises `SettingsError`."""
    if plot is not None:
        require_plot(plot)
    curves = synthetic_curves(peak, seed) if trace is None else [read_curve(trace)]
    runs = [run_scaled(arrivals(curve, seed), scenario, seed) for curve in curves]
    outcomes = [
        _outcome(curve, run, scenario, seed) for curve, run in zip(curves, runs, strict=True)
    ]
    if plot is not None:
        _write_plot(curves, runs, scenario, plot)
    if as_json:
        print(json.dumps({"scenario": asdict(scenario), "loads": [asdict(o) for o in outcomes]}))
    else:
        print(f"{_setting(scenario, seed)}\n\n{_table(outcomes)}")


def _outcome(curve: LoadCurve, run: FleetRun, scenario: FleetScenario, seed: int) -> Outcome:
    replicas = scenario.replicas_for(float(curve.rates.max()))
    fixed = run_fixed(arrivals(curve, seed), scenario, replicas)
    target = scenario.settings.queue_seconds
    return Outcome(
        load=curve.name,
        hours=len(curve.rates) / 3600,
        fixed_replicas=replicas,
        replica_hours=run.replica_hours,
        fixed_replica_hours=fixed.replica_hours,
        over_target=run.share_over(target),
        fixed_over_target=fixed.share_over(target),
        longest_wait_seconds=float(run.queue_seconds.max()),
        num_changes=run.num_changes,
        most_replicas=int(run.replicas.max()),
    )


def _setting(scenario: FleetScenario, seed: int) -> str:
    settings = scenario.settings
    return "\n".join(
        (
            f"a replica computes {scenario.replica_rate:g} requests/s and starts in"
            f" {scenario.start_seconds} s; seed {seed}",
            f"aim: {settings.busy_share:.0%} busy, {settings.queue_seconds:g} s in the queue;"
            f" {settings.min_replicas} to {settings.max_replicas} replicas, at most"
            f" {settings.max_factor:g}x at once, up after {settings.up_after_seconds:g} s,"
            f" down after {settings.down_after_seconds:g} s",
        )
    )


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        (
            each.load,
            f"{each.hours:.1f}",
            each.fixed_replicas,
            f"{each.replica_hours:.1f}",
            f"{each.replica_hours / each.fixed_replica_hours:.0%}",
            f"{each.over_target:.2%}",
            f"{each.fixed_over_target:.2%}",
            f"{each.longest_wait_seconds:.1f} s",
            each.num_changes,
            each.most_replicas,
        )
        for each in outcomes
    ]
    return text_table(HEADER, rows)


def _write_plot(
    curves: Sequence[LoadCurve], runs: Sequence[FleetRun], scenario: FleetScenario, path: Path
) -> None:
    with figure(path, num_rows=1, num_columns=len(curves)) as panels:
        for axes, curve, run in zip(panels, curves, runs, strict=True):
            hours = [second / 3600 for second in range(len(curve.rates))]
            needed = [scenario.replicas_for(rate) for rate in curve.rates.tolist()]
            axes.plot(hours, needed, color="grey", linewidth=0.5, label="needed")
            axes.plot(hours, run.replicas, label="replicas")
            axes.set(xlabel="hours", ylim=(0, None))
            axes.set_title(curve.name)
        panels[0].legend()
