"""`model1 plan experts`: how well the planner follows a load whose hot experts change."""

import json
from dataclasses import asdict
from pathlib import Path

from cluster.config import SettingsError
from cluster.expert_placement import balance_by_chance
from cluster.figure import figure, require_plot
from cluster.output import text_table
from cluster.plan.expert_drift import TARGET, Scenario, Simulation, simulate_drift

HEADER = (
    *("drift at", "balance then", f"until {TARGET}", "settled", "best found", "bound"),
    *("loads", "GB"),
)


def plan_experts(scenario: Scenario, *, seed: int, plot: Path | None, as_json: bool) -> None:
    """Seconds for minutes of simulated time. Raises `SettingsError`."""
    if scenario.num_replicas > scenario.num_experts:
        raise SettingsError(
            f"--replicas {scenario.num_replicas}: there are {scenario.num_experts} experts to share"
        )
    if scenario.topk > scenario.num_experts:
        raise SettingsError(f"--topk {scenario.topk}: there are {scenario.num_experts} experts")
    if plot is not None:
        require_plot(plot)
    simulation = simulate_drift(scenario, seed=seed)
    if plot is not None:
        _write_plot(simulation, plot)
    print(json.dumps(asdict(simulation)) if as_json else _report(simulation, seed))


def _report(simulation: Simulation, seed: int) -> str:
    scenario = simulation.scenario
    rows = [
        (
            f"{drift.at_seconds} s",
            f"{drift.balance_at_once:.3f}",
            "not reached" if drift.seconds_to_target is None else f"{drift.seconds_to_target} s",
            f"{drift.settled_balance:.3f}",
            f"{drift.best_found:.3f}",
            f"{drift.bound:.3f}",
            drift.num_loads,
            round(drift.num_loads * scenario.expert_bytes / 1e9, 1),
        )
        for drift in simulation.drifts
    ]
    return "\n".join((_setting(scenario, seed), "", text_table(HEADER, rows), _verdict(simulation)))


def _setting(scenario: Scenario, seed: int) -> str:
    settings = scenario.settings
    pairs_per_second = scenario.rows_per_second * scenario.topk
    chance = balance_by_chance(pairs_per_second, scenario.num_replicas)
    return "\n".join(
        (
            f"{scenario.num_experts} experts on {scenario.num_replicas} replicas and"
            f" {settings.redundancy:.1%} more copies; top-{scenario.topk} by Zipf"
            f"({scenario.zipf_exponent:g}), {scenario.rows_per_second:,} rows/s; seed {seed}",
            f"an expert is {scenario.expert_bytes / 1e6:.0f} MB and loads in"
            f" {scenario.load_seconds:.2f} s, at most {scenario.loads_at_once} at once;"
            f" planned every {scenario.plan_every_seconds} s",
            "balance: mean over largest load of the replicas in one second, which chance alone"
            f" lowers to {chance:.2f};",
            "the first drift is the start",
        )
    )


def _verdict(simulation: Simulation) -> str:
    drifts = simulation.drifts
    bound = min(drift.bound for drift in drifts)
    if bound < TARGET:
        return (
            f"{simulation.scenario.settings.redundancy:.1%} more copies cannot reach {TARGET}: one"
            f" copy of the hottest expert alone keeps the balance at {bound:.3f} or below"
        )
    times = [drift.seconds_to_target for drift in drifts if drift.seconds_to_target is not None]
    reached = f"{TARGET} was reached and kept after {len(times)} of {len(drifts)} drifts"
    return f"{reached}, at the latest within {max(times)} s" if times else reached


def _write_plot(simulation: Simulation, path: Path) -> None:
    with figure(path, num_rows=1, num_columns=1) as (axes,):
        axes.plot(simulation.balances, linewidth=1)
        axes.axhline(TARGET, color="grey", linestyle=":")
        for drift in simulation.drifts:
            axes.axvline(drift.at_seconds, color="grey", linewidth=0.5)
        axes.set(xlabel="seconds; lines: the hot experts change", ylim=(0, 1))
        axes.set_ylabel("mean / largest load of the replicas")
        axes.set_title(f"{simulation.scenario.num_replicas} replicas under a drifting load")
