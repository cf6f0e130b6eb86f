"""Requests a second over time: made-up days and minutes, and recorded ones from a file."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.config import SettingsError

COLUMNS = ["seconds", "requests_per_second"]
_HOUR = 3600
_MAX_SECONDS = 31 * 24 * _HOUR
_MAX_RATE = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class LoadCurve:
    name: str
    rates: NDArray[np.float64]  # of each second


def synthetic_curves(peak: float, seed: int) -> list[LoadCurve]:
    """What is hard for a policy, each in its own way. `peak` is about the largest rate."""
    rng = np.random.default_rng(seed)
    second = np.arange(_HOUR, dtype=np.float64)
    day = np.arange(24 * _HOUR, dtype=np.float64)
    spikes = np.full(2 * _HOUR, 0.2)
    for start in range(600, 2 * _HOUR, 1200):
        spikes[start : start + 180] = 1.0
    jumps = np.repeat(1 + 0.25 * rng.standard_normal(_HOUR // 10), 10)
    shapes = {
        "step": np.where((second >= 600) & (second < 2400), 0.8, 0.2),
        "ramp": 0.1 + 0.9 * np.clip((second - 600) / 1800, 0, 1),
        "diurnal": 0.15 + 0.85 * np.sin(np.pi * day / day.size) ** 2,
        "spikes": spikes,
        "noise": 0.5 * np.clip(jumps, 0, 2),
    }
    return [LoadCurve(name, peak * shape) for name, shape in shapes.items()]


def read_curve(path: Path) -> LoadCurve:
    """A CSV file with the columns seconds and requests_per_second. A rate holds until the next
    line; the last line says where the recording ends. Raises `SettingsError` naming the line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"--trace {path}: {error}") from None
    if not lines or lines[0] != COLUMNS:
        raise SettingsError(f"--trace {path}: the first line must be {','.join(COLUMNS)}")
    points = [_point(path, number, line) for number, line in enumerate(lines[1:], 2) if line]
    if len(points) < 2:
        raise SettingsError(f"--trace {path}: {len(points)} lines of values; 2 or more are needed")
    start, end = points[0][0], points[-1][0]
    for (earlier, _), (later, _) in itertools.pairwise(points):
        if later <= earlier:
            raise SettingsError(f"--trace {path}: {later:g} seconds come after {earlier:g}")
    if not 1 <= end - start <= _MAX_SECONDS:
        raise SettingsError(
            f"--trace {path}: spans {end - start:g} seconds; 1 to {_MAX_SECONDS} are possible"
        )
    times, rates = np.array(points).T
    seconds = start + np.arange(math.floor(end - start))
    return LoadCurve(path.stem, rates[np.searchsorted(times, seconds, side="right") - 1])


def _point(path: Path, number: int, line: list[str]) -> tuple[float, float]:
    try:
        at, rate = (float(cell) for cell in line)
    except ValueError:
        at = rate = math.nan
    if not (math.isfinite(at) and 0 <= rate < _MAX_RATE):
        raise SettingsError(
            f"--trace {path}: line {number}, {','.join(line)!r}, is not a time and a rate"
        )
    return at, rate
