"""Two readings of a process's report, and what happened in between.

Reports hold counts since a process serves; rates, shares of time and percentiles of late are those
of a window. Knows neither who asks nor what is made of it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from protos.control_pb2 import RoleStats
from protos.histogram_pb2 import Histogram as HistogramMessage
from services.histogram import Histogram, added


class Reading(NamedTuple):
    """What a process reported. `pid` 0: there is none."""

    pid: int
    stats: RoleStats


@dataclass(frozen=True, slots=True)
class Window:
    """From `then` to `now`; an empty `then` is the start of the process."""

    now: RoleStats
    then: RoleStats = field(default_factory=RoleStats)

    @property
    def seconds(self) -> float:
        """On the process's own clock; 0: it has reported nothing since."""
        return self.now.seconds - self.then.seconds

    def count(self, read: Callable[[RoleStats], float]) -> float:
        return read(self.now) - read(self.then)

    def rate(self, read: Callable[[RoleStats], float]) -> float | None:
        """A second; of counted seconds, the share of time. None: no time has passed."""
        return self.count(read) / self.seconds if self.seconds > 0 else None

    def histogram(self, read: Callable[[RoleStats], HistogramMessage]) -> Histogram:
        return Histogram.from_wire(read(self.now)).since(Histogram.from_wire(read(self.then)))


class Windows:
    """Remembers the last reading of each process."""

    def __init__(self) -> None:
        self._last: dict[str, Reading] = {}

    def until(self, readings: Mapping[str, Reading]) -> dict[str, Window]:
        """From the last readings to these, by name. A process that is new, or another one than the
        last time, has a window from its start."""
        windows = {}
        for name, reading in readings.items():
            last = self._last.get(name)
            is_same = last is not None and last.pid == reading.pid
            if last is None or not is_same or last.stats.seconds > reading.stats.seconds:
                windows[name] = Window(reading.stats)
            else:
                windows[name] = Window(reading.stats, last.stats)
        self._last = dict(readings)
        return windows


def answers_of(router: Window, addresses: Collection[str] | None = None) -> Histogram:
    """What the answers of the replicas at these addresses took, or of all."""
    then = {link.address: link.answer_seconds for link in router.then.router.replicas}
    answers = []
    for link in router.now.router.replicas:
        if addresses is None or link.address in addresses:
            now = Histogram.from_wire(link.answer_seconds)
            before = Histogram.from_wire(then.get(link.address, HistogramMessage()))
            # A link that was closed and opened again counts anew.
            answers.append(now.since(before) if before.count <= now.count else now)
    return added(answers)
