"""Keeps actors alive: notices the end of a process at once, has it known, and starts another.

Knows neither which actors there are to be nor how many: whoever is kept comes back under its name
until it is let go.
"""

import asyncio
import logging

from cluster.backoff import Backoff, RestartPolicy
from cluster.members import DeploymentError, Machines
from cluster.roster import Roster
from cluster.topology import SLOTS, ActorSpec, NoFreeSlot, Role, elsewhere, with_companions

log = logging.getLogger(__name__)


class Keeper:
    def __init__(
        self,
        roster: Roster,
        machines: Machines,
        policy: RestartPolicy,
        start_timeout_seconds: float,
    ) -> None:
        self._roster = roster
        self._machines = machines
        self._policy = policy
        self._start_timeout_seconds = start_timeout_seconds
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def keep(self, spec: ActorSpec) -> None:
        """One that serves, from now on."""
        self._tasks[spec.name] = asyncio.create_task(self._keep(spec), name=f"keep {spec.name}")
        self._tasks[spec.name].add_done_callback(log_failure)

    async def let_go(self, name: str) -> None:
        """Its end is somebody else's from now on, whatever state it is in."""
        if task := self._tasks.pop(name, None):
            task.cancel()
            await asyncio.wait([task])

    async def let_all_go(self) -> None:
        tasks, self._tasks = self._tasks, {}
        for task in tasks.values():
            task.cancel()
        if tasks:
            await asyncio.wait(tasks.values())

    async def _keep(self, spec: ActorSpec) -> None:
        clock = asyncio.get_running_loop().time
        backoff = Backoff(self._policy)
        while True:
            since = clock()
            why = await self._roster.ended(spec.name)
            log.warning("actor_ended name=%s why=%s", spec.name, why)
            self._roster.lose(spec.name)
            async with asyncio.TaskGroup() as both:
                # A router that is slow to learn of the loss does not hold up the new process.
                both.create_task(self._tell_of(spec))
                both.create_task(self._bring_back(spec, backoff, clock() - since))

    async def _tell_of(self, spec: ActorSpec) -> None:
        """Its callers, that it went or came; and itself, of what happened while it started."""
        match spec.role:
            case Role.EXPERT:
                await self._roster.tell_epoch()
            case Role.ATTENTION:
                await self._roster.tell(Role.GATEWAY)
            case Role.ROUTER | Role.GATEWAY | Role.KVSTORE:  # found where it was
                await self._roster.tell(spec.role)

    async def _bring_back(self, spec: ActorSpec, backoff: Backoff, lived_seconds: float) -> None:
        while True:
            await asyncio.sleep(backoff.delay_seconds(lived_seconds))
            lived_seconds = 0.0
            try:
                async with asyncio.timeout(self._start_timeout_seconds):
                    place = await self._where_it_can_be(spec)
                    self._roster.recreate(place)
                    await self._bring_companions(place)
                    await self._roster.load(spec.name, gently=self._has_stand_in(spec))
                    await self._roster.serve(spec.name)
            except (DeploymentError, NoFreeSlot, TimeoutError) as error:
                took = f"it did not start within {self._start_timeout_seconds:g} s"
                log.warning("not_restarted name=%s why=%s", spec.name, str(error) or took)
                self._roster.lose(spec.name)
                continue
            self._roster.admit([spec.name])
            log.info("restarted name=%s", spec.name)
            await self._tell_of(spec)
            return

    async def _where_it_can_be(self, spec: ActorSpec) -> ActorSpec:
        """Who computes need not wait for its node to come back. The others belong to theirs.
        Raises `NoFreeSlot`."""
        rooms = await self._machines.rooms()
        now = self._roster.topology.named(spec.name) or spec
        if rooms[now.node].is_alive:
            return now
        if spec.role in SLOTS:
            return elsewhere(self._roster.topology, now, rooms)
        raise DeploymentError(f"its node is away, and it belongs to node {now.node}")

    def _has_stand_in(self, spec: ActorSpec) -> bool:
        """Others do its work meanwhile, and need the processor for it."""
        topology = self._roster.topology
        match spec.role:
            case Role.EXPERT:
                now = topology.named(spec.name) or spec
                ready = (r for r in topology.of_role(spec.role) if r.name in self._roster.ready)
                return {e for replica in ready for e in replica.experts}.issuperset(now.experts)
            case Role.ATTENTION:
                alike = topology.of_role(spec.role)
            case _:
                return False  # one a node
        return any(each.name in self._roster.ready for each in alike)

    async def _bring_companions(self, spec: ActorSpec) -> None:
        """What a worker needs on the node that it was moved to, and nobody there needed before."""
        if spec.role is not Role.ATTENTION:
            return
        now = self._roster.topology
        new = [each for each in with_companions(now).actors if now.named(each.name) is None]
        if not new:
            return
        self._roster.add(new)
        try:
            await self._roster.bring_up(new, self._start_timeout_seconds)
        except DeploymentError:
            self._roster.remove([each.name for each in new])
            raise
        for each in new:
            self.keep(each)


def log_failure(task: asyncio.Task[None]) -> None:
    """A bug of ours must not end silently: nobody does that task's work any more."""
    if not task.cancelled() and (error := task.exception()):
        log.error("supervisor_task_failed task=%s", task.get_name(), exc_info=error)
