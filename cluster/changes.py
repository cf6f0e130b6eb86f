"""Owns what is changed of a deployment while it serves: actors added, drained and removed, and
experts moved between replicas.

One change at a time. What is added is known to others once it is warm, what is removed is forgotten
by them before it drains; a change that fails leaves the deployment as it was, but for the experts
that were moved until then.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

from cluster.expert_balance import ExpertBalance
from cluster.expert_moves import Move, moves_of
from cluster.expert_placement import PlacementPlan
from cluster.expert_shift import ExpertShift
from cluster.keeper import Keeper
from cluster.members import (
    Change,
    ChangeFailed,
    ChangeInvalid,
    ChangeRefused,
    DeploymentError,
    Machines,
    MemberState,
    Rebalance,
    UnknownActor,
)
from cluster.roster import Roster, together
from cluster.topology import (
    SLOTS,
    ActorSpec,
    NoFreeSlot,
    Role,
    Room,
    Topology,
    surplus,
    with_replacements,
    with_replicas,
    with_workers,
)

log = logging.getLogger(__name__)

MAX_OF_A_KIND = 1024
# Between two looks whether there is room again.
RESTORE_SECONDS = 1.0
RESTORE_AGAIN_SECONDS = 10.0

# From a node that is drained: whoever is called goes after his callers.
LEAVING_ORDER = (
    (Role.GATEWAY, Role.ATTENTION, Role.EXPERT),
    (Role.ROUTER,),
    (Role.KVSTORE,),
)

Done = TypeVar("Done")
Growth: TypeAlias = Callable[[Topology, Sequence[Room]], Topology]


class Changes:
    def __init__(
        self,
        roster: Roster,
        keeper: Keeper,
        machines: Machines,
        *,
        start_timeout_seconds: float,
        drain_seconds: float,
        balance: ExpertBalance,
    ) -> None:
        self.shift = ExpertShift(roster)
        self._balance = balance
        self._roster = roster
        self._keeper = keeper
        self._machines = machines
        self._start_timeout_seconds = start_timeout_seconds
        self._drain_seconds = drain_seconds
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        self._displaced: list[ActorSpec] = []  # who left with a node and found no place

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        """So many replicas of that group, or of each. Raises `ChangeInvalid` and `ChangeFailed`."""
        return await self._in_turn(self._scale_experts(num_replicas, group))

    async def scale_attention(self, num_workers: int) -> Change:
        """Raises `ChangeInvalid` and `ChangeFailed`."""
        return await self._in_turn(self._scale_attention(num_workers))

    async def drain(self, name: str) -> Change:
        """Take this one out for good. Raises `UnknownActor` and `ChangeRefused`."""
        return await self._in_turn(self._drain(name))

    async def resize(self, num_workers: int, num_replicas: int) -> Change:
        """So many attention workers and replicas of each group. Where nobody is there yet: every
        role at once. Raises `ChangeInvalid` and `ChangeFailed`."""
        return await self._in_turn(self._resize(num_workers, num_replicas))

    async def drain_node(self, node: str) -> Change:
        """Take out whatever runs on the node of this address or id, after a replacement where there
        is room; whoever found none is started as soon as there is some. It takes nobody any more.
        Raises `ChangeRefused`, and `ChangeFailed` when there is no room for what cannot be missed.
        """
        return await self._in_turn(self._drain_node(node))

    async def restore(self) -> None:
        """Start again whoever left with a node and found no place, for as long as it takes."""
        while True:
            await asyncio.sleep(RESTORE_SECONDS)
            if not self._displaced:
                continue
            try:
                await self._in_turn(self._restore())
            except DeploymentError:
                await asyncio.sleep(RESTORE_AGAIN_SECONDS)

    async def rebalance(self, *, dry_run: bool) -> Rebalance:
        """Move experts so that all replicas have the same work, or say what would be moved. Raises
        `ChangeRefused` and `ChangeFailed`."""
        if dry_run:
            plan, moves = self._moves()
            return self._rebalanced(plan, moves)
        return await self._in_turn(self._rebalance())

    async def stop(self) -> None:
        """Nothing changes any more; whoever waits for a change is told so."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _in_turn(self, change: Coroutine[None, None, Done]) -> Done:
        """To its end, also when whoever asked for it is gone."""

        async def wait_and_change() -> Done:
            async with self._one_at_a_time:
                return await change

        task = asyncio.create_task(wait_and_change())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self._is_stopping:
            task.cancel()
        await asyncio.wait([task])
        change.close()  # one that was cancelled before its turn
        if task.cancelled():
            raise ChangeFailed("the deployment is stopping")
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("change_failed why=%s", error)  # whoever asked may be gone

    async def _resize(self, num_workers: int, num_replicas: int) -> Change:
        if self._roster.topology.actors:
            workers = await self._scale_attention(num_workers)
            replicas = await self._scale_experts(num_replicas, None)
            added = (*workers.added, *replicas.added)
            return self._told(added, (*workers.removed, *replicas.removed))
        _check_count("attention workers", num_workers)
        _check_count("replicas", num_replicas)

        def whole(topology: Topology, rooms: Sequence[Room]) -> Topology:
            topology = with_workers(topology, num_workers, rooms)
            return with_replicas(topology, num_replicas, range(topology.num_groups), rooms)

        return self._told(await self._grow(whole, gently=False), ())

    async def _drain_node(self, node: str) -> Change:
        numbers = await self._machines.close(node)
        leaving = self._on(numbers)
        if not leaving:
            return self._told((), ())
        self._check_gateways_beside(leaving, or_new=self._roster.topology.with_gateways)
        needed = self._indispensable(leaving)
        try:
            added = await self._grow(
                lambda topology, rooms: with_replacements(topology, leaving, rooms, needed)
            )
        except ChangeFailed as error:
            if needed:
                raise
            log.warning("not_replaced node=%s why=%s", node, error)
            added = ()
        await self._publish(added)
        self._check_gateways_beside(leaving)
        new = [self._roster.topology.named(name) for name in added]
        self._displaced += _unmatched(leaving, [spec for spec in new if spec])
        by_now = self._on(numbers)
        removed: tuple[str, ...] = ()
        for roles in LEAVING_ORDER:
            removed += await self._shrink([spec for spec in by_now if spec.role in roles])
        await self._roster.tell(Role.GATEWAY, Role.KVSTORE)
        return self._told(added, removed)

    def _on(self, nodes: Collection[int]) -> list[ActorSpec]:
        return [spec for spec in self._roster.topology.actors if spec.node in nodes]

    def _check_gateways_beside(self, leaving: Sequence[ActorSpec], *, or_new: bool = False) -> None:
        going = {spec.name for spec in leaving if spec.role is Role.GATEWAY}
        gateways = {spec.name for spec in self._roster.topology.of_role(Role.GATEWAY)}
        if going and not or_new and not (gateways - going) & self._roster.ready:
            raise ChangeRefused(f"{', '.join(sorted(going))} is the only gateway that is ready")

    def _indispensable(self, leaving: Sequence[ActorSpec]) -> frozenset[str]:
        """One of each kind of which nobody else is ready."""
        names = {spec.name for spec in leaving}
        topology = self._roster.topology
        kinds = [topology.of_role(Role.ATTENTION)]
        kinds += [topology.replicas_of(group) for group in range(topology.num_groups)]
        return frozenset(
            going[0]
            for kind in kinds
            if (going := [spec.name for spec in kind if spec.name in names])
            and self._roster.ready.isdisjoint({spec.name for spec in kind} - names)
        )

    async def _restore(self) -> Change:
        waiting, rooms = self._displaced, await self._machines.rooms()
        for spec in waiting:
            wanted = with_replacements(self._roster.topology, [spec], rooms)
            if wanted == self._roster.topology:
                continue
            added = await self._grow(_exactly(wanted))
            self._displaced = [each for each in self._displaced if each is not spec]
            await self._publish(added)
            log.info("restored instead_of=%s names=%s", spec.name, ",".join(added))
            return self._told(added, ())
        return self._told((), ())

    async def _publish(self, added: Sequence[str]) -> None:
        """Whoever was added is used from now on."""
        roles = {spec.role for name in added if (spec := self._roster.topology.named(name))}
        if Role.EXPERT in roles:
            await self._roster.tell_epoch()
        if Role.ATTENTION in roles:
            await self._roster.tell(Role.GATEWAY)

    async def _scale_experts(self, num_replicas: int, group: int | None) -> Change:
        _check_count("replicas", num_replicas)
        num_groups = self._roster.topology.num_groups
        if group is not None and not 0 <= group < num_groups:
            raise ChangeInvalid(
                f"expert group {group}: the deployment has the groups 0 to {num_groups - 1}"
            )
        groups = range(num_groups) if group is None else (group,)
        self._displaced = [
            each
            for each in self._displaced
            if each.role is Role.ATTENTION or each.group not in groups
        ]
        added = await self._grow(
            lambda topology, rooms: with_replicas(topology, num_replicas, groups, rooms)
        )
        if added:
            await self._roster.tell_epoch()
        leaving = [
            spec
            for each in groups
            for spec in surplus(
                self._roster.topology.replicas_of(each), num_replicas, self._roster.ready
            )
        ]
        return self._told(added, await self._shrink(leaving))

    async def _scale_attention(self, num_workers: int) -> Change:
        _check_count("attention workers", num_workers)
        self._displaced = [each for each in self._displaced if each.role is not Role.ATTENTION]
        added = await self._grow(lambda topology, rooms: with_workers(topology, num_workers, rooms))
        if added:
            await self._roster.tell(Role.GATEWAY)
        workers = self._roster.topology.of_role(Role.ATTENTION)
        leaving = surplus(workers, num_workers, self._roster.ready)
        return self._told(added, await self._shrink(leaving))

    async def _drain(self, name: str) -> Change:
        topology = self._roster.topology
        spec = topology.named(name)
        if spec is None:
            names = ", ".join(actor.name for actor in topology.actors)
            raise UnknownActor(f"no actor is called {name!r}; there are {names}")
        match spec.role:
            case Role.EXPERT:
                alike, what = topology.replicas_of(spec.group), f"expert group {spec.group}"
            case Role.ATTENTION:
                alike, what = topology.of_role(Role.ATTENTION), "the attention workers"
            case _:
                raise ChangeRefused(
                    f"{name} is a {spec.role}: what can be drained are expert replicas and "
                    "attention workers"
                )
        others = [actor.name for actor in alike if actor.name != name]
        if not others:
            raise ChangeRefused(f"{name} is the last of {what}")
        if self._roster.ready.isdisjoint(others):
            raise ChangeRefused(f"{name} is the only one of {what} that is ready")
        return self._told((), await self._shrink([spec]))

    async def _rebalance(self) -> Rebalance:
        plan, moves = self._moves()
        await self.shift.carry_out(moves)
        return self._rebalanced(plan, moves)

    def _moves(self) -> tuple[PlacementPlan, tuple[Move, ...]]:
        plan = self._balance.even()
        return plan, moves_of(plan, self._balance.load)

    def _rebalanced(self, plan: PlacementPlan, moves: tuple[Move, ...]) -> Rebalance:
        return Rebalance(self._roster.epoch, moves, plan.balance_before, plan.balance_after)

    async def _grow(self, growth: Growth, *, gently: bool = True) -> tuple[str, ...]:
        """Bring up what `growth` adds, and keep it; callers do not know of it yet."""
        roster = self._roster
        wanted = await self._planned(growth)
        new = [spec for spec in wanted.actors if roster.topology.named(spec.name) is None]
        if not new:
            return ()
        names = tuple(spec.name for spec in new)
        log.info("scaling_up names=%s", ",".join(names))
        roster.add(new)
        try:
            await roster.bring_up(new, self._start_timeout_seconds, gently=gently)
        except DeploymentError as error:
            serving = [name for name in names if roster.state(name) is MemberState.READY]
            await together(roster.stop(name, 0.0) for name in serving)
            roster.remove(names)
            await roster.tell(Role.KVSTORE)
            raise ChangeFailed(f"{error}; nothing has changed") from error
        for spec in new:
            self._keeper.keep(spec)
        return names

    async def _planned(self, growth: Growth) -> Topology:
        for _ in SLOTS:  # each kind may be waited for once
            try:
                return growth(self._roster.topology, await self._machines.rooms())
            except NoFreeSlot as lacking:
                await self._machines.wait_for_slots(lacking.role, lacking.num_wanted)
        try:
            return growth(self._roster.topology, await self._machines.rooms())
        except NoFreeSlot as error:
            raise ChangeFailed(f"{error}; nothing has changed") from None

    async def _shrink(self, specs: Sequence[ActorSpec]) -> tuple[str, ...]:
        """Their callers forget them, they finish what they have, they end."""
        if not specs:
            return ()
        roster = self._roster
        names = tuple(spec.name for spec in specs)
        if any(spec.role is Role.EXPERT for spec in specs):  # those who stay take what they hold
            moves = moves_of(self._balance.without(names), self._balance.load)
            await self.shift.carry_out(moves)
        log.info("scaling_down names=%s", ",".join(names))
        await together(self._keeper.let_go(name) for name in names)
        serving = [name for name in names if roster.state(name) is MemberState.READY]
        roster.drain(serving)
        roles = {spec.role for spec in specs}
        if Role.EXPERT in roles:
            await roster.tell_epoch()
        if Role.ATTENTION in roles:
            await roster.tell(Role.GATEWAY)
        await together(roster.stop(name, self._drain_seconds) for name in serving)
        roster.remove(names)
        return names

    def _told(self, added: tuple[str, ...], removed: tuple[str, ...]) -> Change:
        return Change(self._roster.epoch, added, removed)


def _exactly(wanted: Topology) -> Growth:
    return lambda _topology, _rooms: wanted


def _unmatched(leaving: Sequence[ActorSpec], added: Sequence[ActorSpec]) -> list[ActorSpec]:
    """Who of those that compute and leave got nobody in their place."""
    came = Counter((spec.role, spec.group) for spec in added)
    left = []
    for spec in leaving:
        if spec.role not in SLOTS:
            continue
        if came[spec.role, spec.group]:
            came[spec.role, spec.group] -= 1
        else:
            left.append(spec)
    return left


def _check_count(what: str, count: int) -> None:
    if not 1 <= count <= MAX_OF_A_KIND:
        raise ChangeInvalid(f"{what} must be from 1 to {MAX_OF_A_KIND}, not {count}")
