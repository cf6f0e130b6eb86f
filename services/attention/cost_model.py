"""Load or compute: what both take, measured, and the plan that follows from it.

Knows how fast steps were and what the tiers say of themselves. No clock, no I/O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from services.attention.restore_plan import RestorePlan, cheapest_plan
from services.kvstore.tier import Tier, TierCost

# Fewer are an end of a prompt, or its share of a step that decodes: they say nothing of its cost.
MIN_MEASURED_TOKENS = 64
# How much the newest step counts.
_NEWEST = 0.2
# Before the first prompt was computed; so slow that everything is loaded.
_UNMEASURED_SECONDS_PER_TOKEN = 1.0
# For a tier that has answered, but was never timed.
_UNMEASURED_TIER = TierCost(latency_seconds=0.001, bytes_per_second=1e9)


class Source(IntEnum):
    """Where a block or a tail is, nearest first."""

    DEVICE = 0  # or in the worker's own memory: nothing to load
    RAM = Tier.RAM
    DISK = Tier.DISK
    PEER = Tier.PEER
    COLD = Tier.COLD


@dataclass(frozen=True, slots=True)
class Places:
    """Where n blocks are: `bodies[i]` of block i, `tails[i]` at its end; None: nowhere."""

    bodies: Sequence[Source | None]
    tails: Sequence[Source | None]


class CostModel:
    """Learns how long computing takes; what loading takes is told each time."""

    def __init__(self, *, block_tokens: int, body_nbytes: int, tail_nbytes: int) -> None:
        self._block_tokens = block_tokens
        self._body_nbytes = body_nbytes
        self._tail_nbytes = tail_nbytes
        self._seconds_per_token: float | None = None

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step that computed so many tokens of prompts took so long."""
        if num_tokens < MIN_MEASURED_TOKENS:
            return
        measured, before = seconds / num_tokens, self._seconds_per_token
        if before is None:
            self._seconds_per_token = measured
        else:
            self._seconds_per_token = before + _NEWEST * (measured - before)

    def compute_seconds(self, num_blocks: int) -> float:
        """Of so many blocks of a prompt."""
        per_token = self._seconds_per_token
        if per_token is None:
            per_token = _UNMEASURED_SECONDS_PER_TOKEN
        return num_blocks * self._block_tokens * per_token

    def plan(self, places: Places, costs: Mapping[Tier, TierCost]) -> RestorePlan:
        """The fastest way to the end of the blocks.

        Asking a tier at all takes its latency, so each farther tier must be worth it as a whole.
        """
        sources = {source for source in (*places.bodies, *places.tails) if source}
        plans = [self._plan_within(limit, places, costs) for limit in (0, *sorted(sources))]
        return min(plans, key=lambda plan: plan.seconds)  # of equals the nearest tiers

    def _plan_within(
        self, farthest: int, places: Places, costs: Mapping[Tier, TierCost]
    ) -> RestorePlan:
        def seconds(source: Source | None, nbytes: int) -> float | None:
            if source is None or source > farthest:
                return None
            return nbytes / _cost(source, costs).bytes_per_second if source else 0.0

        plan = cheapest_plan(
            [seconds(source, self._body_nbytes) for source in places.bodies],
            [seconds(source, self._tail_nbytes) for source in places.tails],
            self.compute_seconds(1),
        )
        latency = sum(_cost(source, costs).latency_seconds for source in used_tiers(plan, places))
        return plan._replace(seconds=plan.seconds + latency)


def free_plan(places: Places) -> RestorePlan:
    """As if loading took no time: everything that can be of use is loaded."""
    return cheapest_plan(
        [None if source is None else 0.0 for source in places.bodies],
        [None if source is None else 0.0 for source in places.tails],
        compute_seconds=1.0,
    )


def used_tiers(plan: RestorePlan, places: Places) -> set[Source]:
    """The tiers that have to be asked for what the plan loads."""
    used = set[Source]()
    for load in plan.loads:
        for source in (*places.bodies[load.start : load.end], places.tails[load.end - 1]):
            if source:
                used.add(source)
    return used


def _cost(source: Source, costs: Mapping[Tier, TierCost]) -> TierCost:
    return costs.get(Tier(source), _UNMEASURED_TIER)
