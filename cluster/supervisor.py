"""Owns a deployment's life: ordered start, what it is watched for, ordered stop.

Its actors are the roster's, that they stay alive is the keeper's, and how they become more or fewer
is that of the changes, asked for by hand or by the loops that scale and rebalance. Knows nothing of
Ray, gRPC or models; sees no token.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.autoscale_loop import AutoscaleLoop
from cluster.backoff import RestartPolicy
from cluster.changes import Changes
from cluster.config import AutoscaleSettings
from cluster.expert_balance import ExpertBalance
from cluster.expert_placement import BalanceSettings
from cluster.heartbeat import Heartbeat
from cluster.keeper import Keeper, log_failure
from cluster.members import Actor, Change, Machines, MemberState, Process, Snapshot
from cluster.rebalance_loop import RebalanceLoop
from cluster.roster import START_ORDER, Adopted, Roster, together
from cluster.topology import ActorSpec, Role, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is waited, and for what."""

    start_seconds: float = 180.0  # until an actor serves
    drain_seconds: float = 30.0  # that requests have left on an actor that goes
    restart_seconds: float = 120.0  # without a role that serving needs
    node_seconds: float = 5.0  # without an answer from any actor of a node
    restarts: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalancing:
    """How many more experts replicas have room for, as a share of their group's, and how often the
    supervisor moves experts by itself; none: never."""

    redundancy: float = 0.125
    every_seconds: float | None = None


class Supervisor:
    """Every actor of one deployment, from their creation to their end."""

    def __init__(
        self,
        topology: Topology,
        create: Callable[[ActorSpec], Actor],
        own_process: Process,
        machines: Machines,
        patience: Patience = Patience(),
        autoscale: AutoscaleSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        rebalancing: Rebalancing = Rebalancing(),
    ) -> None:
        """Without `autoscale` actors become more and fewer by hand alone."""
        self._own_process = own_process
        self._patience = patience
        self._roster = Roster(topology, create)
        self._keeper = Keeper(
            self._roster, machines, patience.restarts, start_timeout_seconds=patience.start_seconds
        )
        room = BalanceSettings(redundancy=rebalancing.redundancy)
        self.balance = ExpertBalance(self._roster, room)
        self._heartbeat = Heartbeat(
            self._roster, machines, own_process.node_id, patience.node_seconds
        )
        self.changes = Changes(
            self._roster,
            self._keeper,
            machines,
            start_timeout_seconds=patience.start_seconds,
            drain_seconds=patience.drain_seconds,
            balance=self.balance,
        )
        self._rebalance_loop = RebalanceLoop(self.balance, self.changes, rebalancing.every_seconds)
        self.autoscaling: AutoscaleLoop | None = None
        if autoscale is not None:
            self.autoscaling = AutoscaleLoop(self._roster, self.changes, autoscale, clock)
        self._always: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Load every role at once, then let them listen in order; returns the gateway's address.

        Ends every actor and raises `DeploymentError` if one fails. From then on who dies is
        started again.
        """
        roster = self._roster
        try:
            await roster.bring_up(roster.topology.actors, self._patience.start_seconds)
        except Exception:
            await self.stop(0.0)
            raise
        self._go_on()
        return roster.address(roster.topology.of_role(Role.GATEWAY)[0].name)

    async def take_over(self, found: Iterable[Adopted]) -> None:
        """Instead of `start`: of actors that serve already, or of none, who come with `resize`."""
        self._roster.adopt(found)
        self._go_on()
        await self._roster.tell_epoch()
        await self._roster.tell(Role.KVSTORE, Role.GATEWAY)

    def _go_on(self) -> None:
        """Whoever dies is started again from now on, and whoever left with a node comes back."""
        for spec in self._roster.topology.actors:
            self._keeper.keep(spec)
        loops = {"restore": self.changes.restore(), "heartbeat": self._heartbeat.run()}
        loops["rebalance"] = self._rebalance_loop.run()
        if self.autoscaling is not None:
            loops["autoscale"] = self.autoscaling.run()
        for name, loop in loops.items():
            self._always.append(asyncio.create_task(loop, name=name))
            self._always[-1].add_done_callback(log_failure)

    def missing(self) -> str | None:
        """What keeps the deployment from serving now."""
        return self._missing()

    async def snapshot(self) -> Snapshot:
        """The members with fresh counts. Whoever does not answer keeps its last count."""
        roster = self._roster
        await together(roster.check(member.spec.name) for member in roster.members)
        autoscaled = self.autoscaling.told() if self.autoscaling else ()
        return Snapshot(roster.epoch, roster.members, self._own_process, autoscaled)

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        """By hand; see Changes. Raises `ChangeRefused` beyond the limits of autoscaling."""
        if self.autoscaling is not None:
            self.autoscaling.require_within_limits(Role.EXPERT, num_replicas)
        return await self.changes.scale_experts(num_replicas, group)

    async def scale_attention(self, num_workers: int) -> Change:
        """By hand; see Changes. Raises `ChangeRefused` beyond the limits of autoscaling."""
        if self.autoscaling is not None:
            self.autoscaling.require_within_limits(Role.ATTENTION, num_workers)
        return await self.changes.scale_attention(num_workers)

    async def watch(self) -> str:
        """Returns why, once the living could not serve for as long as restarts may take."""
        roster = self._roster
        while True:
            while (why := self._missing()) is None:
                await roster.change()
            try:
                async with asyncio.timeout(self._patience.restart_seconds):
                    while self._missing():
                        await roster.change()
            except TimeoutError:
                why = self._missing() or why
                return f"{why}, and no restart helped in {self._patience.restart_seconds:g} s"

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain callers before those whom they call, then end every process. The grace time is
        that of all roles together. Whoever serves yet has a say, also while others still start:
        a KV store that is just killed leaves its shared memory behind."""
        for task in self._always:
            task.cancel()
        if self._always:
            await asyncio.wait(self._always)
        await self._keeper.let_all_go()
        await self.changes.stop()
        await self._keeper.let_all_go()  # whom a change that was under way had just added
        clock = asyncio.get_running_loop().time
        if grace_seconds is None:
            grace_seconds = self._patience.drain_seconds
        if not any(spec.name in self._roster.ready for spec in self._of_role(Role.GATEWAY)):
            grace_seconds = 0.0  # nobody waits for an answer
        deadline = clock() + grace_seconds
        for role in reversed(START_ORDER):
            left_seconds = max(0.0, deadline - clock())
            await together(self._stop(spec, left_seconds) for spec in self._of_role(role))
        self._roster.kill_all()

    async def _stop(self, spec: ActorSpec, grace_seconds: float) -> None:
        if self._roster.state(spec.name) not in (MemberState.READY, MemberState.DRAINING):
            return
        self._roster.drain([spec.name])
        await self._roster.stop(spec.name, grace_seconds)

    def _missing(self) -> str | None:
        return self._roster.topology.missing(self._roster.ready)

    def _of_role(self, role: Role) -> tuple[ActorSpec, ...]:
        return self._roster.topology.of_role(role)
