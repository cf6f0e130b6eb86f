"""Owns what is changed of a deployment while it serves: actors added, drained and removed.

One change at a time. What is added is known to others once it is warm, what is removed is forgotten
by them before it drains; a change that fails leaves the deployment as it was.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeAlias

from cluster.keeper import Keeper
from cluster.members import (
    Change,
    ChangeFailed,
    ChangeInvalid,
    ChangeRefused,
    DeploymentError,
    Machines,
    MemberState,
    UnknownActor,
)
from cluster.roster import Roster, together
from cluster.topology import (
    ActorSpec,
    NoFreeSlot,
    Role,
    Room,
    Topology,
    surplus,
    with_replicas,
    with_workers,
)

log = logging.getLogger(__name__)

MAX_OF_A_KIND = 1024

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
    ) -> None:
        self._roster = roster
        self._keeper = keeper
        self._machines = machines
        self._start_timeout_seconds = start_timeout_seconds
        self._drain_seconds = drain_seconds
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[Change]] = set()
        self._is_stopping = False

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        """So many replicas of that group, or of each. Raises `ChangeInvalid` and `ChangeFailed`."""
        return await self._in_turn(self._scale_experts(num_replicas, group))

    async def scale_attention(self, num_workers: int) -> Change:
        """Raises `ChangeInvalid` and `ChangeFailed`."""
        return await self._in_turn(self._scale_attention(num_workers))

    async def drain(self, name: str) -> Change:
        """Take this one out for good. Raises `UnknownActor` and `ChangeRefused`."""
        return await self._in_turn(self._drain(name))

    async def stop(self) -> None:
        """Nothing changes any more; whoever waits for a change is told so."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _in_turn(self, change: Coroutine[None, None, Change]) -> Change:
        """To its end, also when whoever asked for it is gone."""

        async def wait_and_change() -> Change:
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

    def _ended(self, task: asyncio.Task[Change]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("change_failed why=%s", error)  # whoever asked may be gone

    async def _scale_experts(self, num_replicas: int, group: int | None) -> Change:
        _check_count("replicas", num_replicas)
        num_groups = self._roster.topology.num_groups
        if group is not None and not 0 <= group < num_groups:
            raise ChangeInvalid(
                f"expert group {group}: the deployment has the groups 0 to {num_groups - 1}"
            )
        groups = range(num_groups) if group is None else (group,)
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

    async def _grow(self, growth: Growth) -> tuple[str, ...]:
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
            await roster.bring_up(new, self._start_timeout_seconds, gently=True)
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
        log.info("scaling_down names=%s", ",".join(names))
        await together(self._keeper.let_go(name) for name in names)
        serving = [name for name in names if roster.state(name) is MemberState.READY]
        roster.drain(serving)
        if specs[0].role is Role.EXPERT:
            await roster.tell_epoch()
        else:
            await roster.tell(Role.GATEWAY)
        await together(roster.stop(name, self._drain_seconds) for name in serving)
        roster.remove(names)
        return names

    def _told(self, added: tuple[str, ...], removed: tuple[str, ...]) -> Change:
        return Change(self._roster.epoch, added, removed)


def _check_count(what: str, count: int) -> None:
    if not 1 <= count <= MAX_OF_A_KIND:
        raise ChangeInvalid(f"{what} must be from 1 to {MAX_OF_A_KIND}, not {count}")
