"""`model1 kv simulate`: what each eviction policy is worth, as a table, JSON or a plot."""

import json
from dataclasses import asdict
from pathlib import Path

from cluster.config import SettingsError
from cluster.output import text_table
from services.kvstore.simulate import CACHE_SHARES, Simulation, simulate


def kv_simulate(num_requests: int, *, seed: int, plot: Path | None, as_json: bool) -> None:
    """About a minute for 5,000 requests."""
    if plot is not None and not plot.absolute().parent.is_dir():
        raise SettingsError(f"--plot: there is no folder {plot.parent}")  # not after the minute
    simulation = simulate(num_requests, seed=seed)
    if plot is not None:
        simulation.write_plot(plot)
    if as_json:
        print(json.dumps([asdict(row) for row in simulation.rows]))
    else:
        print(_table(simulation))


def _table(simulation: Simulation) -> str:
    """A row a trace and policy: shares of the bytes asked for that a request could resume from."""
    rates = {
        (row.trace, row.policy, row.cache_share): row.rates.resumable for row in simulation.rows
    }
    header = ("resumable share", "policy", *(f"cache {share:.0%}" for share in CACHE_SHARES))
    pairs = dict.fromkeys((row.trace, row.policy) for row in simulation.rows)
    rows = [
        (trace, policy, *(f"{rates[trace, policy, share]:.1%}" for share in CACHE_SHARES))
        for trace, policy in pairs
    ]
    return text_table(header, rows)
