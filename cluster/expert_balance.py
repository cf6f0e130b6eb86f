"""How evenly the expert replicas are loaded, as the routers count it, and who should hold what.

Changes nothing. Where there is no load, there is nothing to even out.
"""

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from cluster.expert_placement import BalanceSettings, PlacementPlan, Replica, plan_placement
from cluster.load_average import LoadAverage
from cluster.members import ChangeRefused
from cluster.readings import Reading, Windows
from cluster.roster import Roster, together
from cluster.topology import ActorSpec, Role

# Of what is remembered of the load: long enough for thousands of pairs, short beside the time in
# which hot experts cool.
HALF_LIFE_SECONDS = 3.0


class ExpertBalance:
    def __init__(self, roster: Roster, settings: BalanceSettings) -> None:
        self._roster = roster
        self._settings = settings
        self._windows = Windows()
        self._load = LoadAverage(roster.topology.num_experts, half_life_seconds=HALF_LIFE_SECONDS)

    @property
    def load(self) -> np.ndarray:
        """(row, expert) pairs a second of each expert, of late [num_experts]."""
        return self._load.per_second

    async def look(self) -> None:
        """At what the routers have counted since the last time."""
        roster = self._roster
        routers = [m.spec.name for m in roster.members if m.spec.role is Role.ROUTER]
        await together(roster.check(name) for name in routers)
        readings = {
            member.spec.name: Reading(member.process.pid, member.stats)
            for member in roster.members
            if member.spec.role is Role.ROUTER and member.spec.name in roster.ready
        }
        windows = self._windows.until(readings).values()
        counts = np.zeros(roster.topology.num_experts)
        for window in windows:
            # Empty until the first pair.
            for sign, counted in ((1, window.now.router), (-1, window.then.router)):
                if counted.expert_pairs:
                    counts += sign * np.array(counted.expert_pairs, dtype=np.float64)
        if (seconds := max((window.seconds for window in windows), default=0.0)) > 0:
            self._load.add(counts, seconds)

    def even(self) -> PlacementPlan:
        """Raises `ChangeRefused` unless all replicas serve: one that is away can take nothing, and
        comes back with what it had."""
        roster = self._roster
        for spec in roster.topology.of_role(Role.EXPERT):
            if spec.name not in roster.ready:
                raise ChangeRefused(
                    f"{spec.name} is {roster.state(spec.name)}: experts move when all replicas "
                    "serve"
                )
        return self._plan((), self._settings)

    def without(self, leaving: Collection[str]) -> PlacementPlan:
        """The least that lets these go: every expert stays with as many replicas as its group has
        then. Raises `ChangeRefused`."""
        return self._plan(leaving, replace(self._settings, act_below=0.0))

    def _plan(self, leaving: Collection[str], settings: BalanceSettings) -> PlacementPlan:
        topology = self._roster.topology.without(leaving)
        min_copies = np.zeros(topology.num_experts, dtype=np.intp)
        for group, owned in enumerate(topology.experts_of_group):
            min_copies[owned.start : owned.stop] = max(1, len(topology.replicas_of(group)))
        replicas = [self._replica(spec) for spec in topology.of_role(Role.EXPERT)]
        try:
            return plan_placement(
                self.load,
                replicas,
                settings,
                num_pairs=self._load.total,
                min_copies=min_copies,
            )
        except ValueError as error:
            raise ChangeRefused(str(error)) from error

    def _replica(self, spec: ActorSpec) -> Replica:
        """With room for its group's experts and some more; as it is where it cannot take any."""
        slots = len(self._roster.topology.experts_of_group[spec.group])
        slots += math.ceil(self._settings.redundancy * slots - 1e-9)
        if spec.name not in self._roster.ready:
            slots = 0
        return Replica(spec.name, max(slots, len(spec.experts)), frozenset(spec.experts))
