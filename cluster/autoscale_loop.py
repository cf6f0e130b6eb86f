"""Scales a deployment by itself: looks at the load now and then, and changes what the policy says.

The policy is autoscale.py's, the change is that of whoever changes by hand, the numbers are the
roles' own reports. Owns what was decided last of each role, and why.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cluster.autoscale import Autoscaler, RoleSample, ScalingSettings
from cluster.changes import Changes
from cluster.config import AutoscaleSettings, ScalingLimits
from cluster.members import ChangeRefused, DeploymentError, Member, MemberState
from cluster.readings import Reading, Window, Windows, answers_of
from cluster.roster import Roster, together
from cluster.topology import Role
from protos.control_pb2 import Autoscaled
from services.histogram import added

log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(slots=True)
class _Scaled:
    """Attention workers, or the replicas of one expert group."""

    role: Role
    group: int | None
    limits: ScalingLimits
    policy: Autoscaler
    desired: int = 0  # 0: nobody has looked yet
    sample: RoleSample = field(default_factory=lambda: RoleSample(0))
    last_change: str = ""
    changed_at: float = 0.0

    @property
    def words(self) -> str:
        return "attention workers" if self.group is None else f"replicas of group {self.group}"


class AutoscaleLoop:
    def __init__(
        self, roster: Roster, changes: Changes, settings: AutoscaleSettings, clock: Clock
    ) -> None:
        self._roster = roster
        self._changes = changes
        self._settings = settings
        self._clock = clock
        self._windows = Windows()
        self._scaled = [
            self._of(Role.ATTENTION, None, settings.attention),
            *(
                self._of(Role.EXPERT, group, settings.experts)
                for group in range(roster.topology.num_groups)
            ),
        ]

    async def run(self) -> None:
        """For as long as the deployment serves."""
        while True:
            await asyncio.sleep(self._settings.interval_seconds)
            try:
                await self.look()
            except DeploymentError as error:  # of one report that nobody could make
                log.warning("autoscale_saw_nothing why=%s", error)

    async def look(self) -> None:
        """At everybody's report, and change what is to be changed."""
        await together(self._roster.check(member.spec.name) for member in self._roster.members)
        members = {m.spec.name: m for m in self._roster.members}
        readings = {name: Reading(m.process.pid, m.stats) for name, m in members.items()}
        windows = self._windows.until(readings)
        for scaled in self._scaled:
            if not (current := self._current(scaled)):
                continue  # none was ever asked for yet
            scaled.sample = self._sample(scaled, list(members.values()), windows)
            scaled.desired = scaled.policy.decide(current, scaled.sample)
            if scaled.desired != current:
                await self._change(scaled, current)

    def require_within_limits(self, role: Role, number: int) -> None:
        """Of a change by hand: beyond the limits it would not last. Raises `ChangeRefused`."""
        limits = self._settings.attention if role is Role.ATTENTION else self._settings.experts
        if not limits.min_replicas <= number <= limits.max_replicas:
            what = "attention" if role is Role.ATTENTION else "experts"
            raise ChangeRefused(
                f"{number} would not last: autoscale.{what} keeps from {limits.min_replicas} to "
                f"{limits.max_replicas}"
            )

    def told(self) -> tuple[Autoscaled, ...]:
        return tuple(self._told(scaled) for scaled in self._scaled)

    def _of(self, role: Role, group: int | None, limits: ScalingLimits) -> _Scaled:
        policy = Autoscaler(ScalingSettings(**limits.model_dump()), self._clock)
        return _Scaled(role, group, limits, policy)

    def _current(self, scaled: _Scaled) -> int:
        """There or on their way."""
        topology = self._roster.topology
        if scaled.group is None:
            return len(topology.of_role(scaled.role))
        return len(topology.replicas_of(scaled.group))

    async def _change(self, scaled: _Scaled, current: int) -> None:
        asked = f"{current} -> {scaled.desired}: {_why(scaled, current)}"
        log.info("autoscale what=%r change=%r", scaled.words, asked)
        try:
            if scaled.group is None:
                await self._changes.scale_attention(scaled.desired)
            else:
                await self._changes.scale_experts(scaled.desired, scaled.group)
        except DeploymentError as error:  # no free slot, say: the policy asks again in its time
            asked += f"; failed: {error}"
        scaled.last_change, scaled.changed_at = asked, self._clock()

    def _sample(
        self, scaled: _Scaled, members: Sequence[Member], windows: dict[str, Window]
    ) -> RoleSample:
        ready = [
            member
            for member in members
            if member.spec.role is scaled.role
            and member.state is MemberState.READY
            and (scaled.group is None or member.spec.group == scaled.group)
        ]
        of_ready = [windows[member.spec.name] for member in ready]
        if scaled.group is None:
            return _attention_sample(of_ready)
        routers = [windows[m.spec.name] for m in members if m.spec.role is Role.ROUTER]
        return _expert_sample(of_ready, routers, {member.address for member in ready})

    def _told(self, scaled: _Scaled) -> Autoscaled:
        told = Autoscaled(
            role=scaled.role,
            expert_group=scaled.group,
            min_replicas=scaled.limits.min_replicas,
            max_replicas=scaled.limits.max_replicas,
            replicas=self._current(scaled),
            desired_replicas=scaled.desired or self._current(scaled),
            busy_share=scaled.sample.busy_share,
            queue_seconds=scaled.sample.queue_seconds,
            last_change=scaled.last_change,
        )
        if scaled.last_change:
            told.last_change_age_seconds = self._clock() - scaled.changed_at
        return told


def _attention_sample(workers: Sequence[Window]) -> RoleSample:
    """How full their steps were, all the time: a worker that serves one sequence is always at
    work, and can serve many more. The queue is that of the worst off."""
    queued = [worker.histogram(lambda stats: stats.attention.queue_seconds) for worker in workers]
    waits = [mean for each in queued if (mean := each.mean) is not None]
    waits += [worker.now.attention.oldest_waiting_seconds for worker in workers if worker.seconds]
    filled = (worker.rate(lambda stats: stats.attention.filled_seconds) for worker in workers)
    return RoleSample(len(workers), _mean(filled), max(waits, default=None))


def _expert_sample(
    replicas: Sequence[Window], routers: Sequence[Window], addresses: set[str]
) -> RoleSample:
    """What routers waited for an answer beyond what a replica was at work for it."""
    busy = (replica.rate(lambda stats: stats.expert.busy_seconds) for replica in replicas)
    answered = added(answers_of(router, addresses) for router in routers)
    num_calls = sum(replica.count(lambda stats: stats.expert.calls) for replica in replicas)
    queue_seconds = None
    if (waited := answered.mean) is not None and num_calls:
        at_work = sum(
            replica.count(lambda stats: stats.expert.busy_seconds) for replica in replicas
        )
        queue_seconds = max(0.0, waited - at_work / num_calls)
    return RoleSample(len(replicas), _mean(busy), queue_seconds)


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _why(scaled: _Scaled, current: int) -> str:
    """What was measured last, beside what is aimed at."""
    sample, limits = scaled.sample, scaled.limits
    if not limits.min_replicas <= current <= limits.max_replicas:
        return f"the limits are {limits.min_replicas} to {limits.max_replicas}"
    words = []
    if sample.busy_share is not None:
        words.append(f"{sample.busy_share:.0%} busy (aim {limits.busy_share:.0%})")
    if sample.queue_seconds is not None:
        words.append(f"{sample.queue_seconds:.3f} s queued (limit {limits.queue_seconds:g} s)")
    return ", ".join(words)
