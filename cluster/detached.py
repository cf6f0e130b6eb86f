"""A deployment that outlives whoever started it, on a Ray cluster: for what Ray Serve runs.

Its actors are detached, and so is their supervisor, which Ray starts again where it can. One that
comes back asks the actors there are who they are, and takes them over as they serve: no stream of
theirs notices. What to do with them is Supervisor's.
"""

import asyncio
import logging
import secrets
from dataclasses import dataclass, replace
from typing import Any

import ray

from cluster.actors import RemoteActor, SupervisorHandle, SupervisorProcess, answer
from cluster.config import Settings
from cluster.members import Change, DeploymentError, Snapshot
from cluster.ray_session import COMPUTE_ENVIRONMENT, hosts_with_slots
from cluster.roster import Adopted
from cluster.topology import empty_topology

log = logging.getLogger(__name__)

NAMESPACE = "model1"
SUPERVISOR = "supervisor"
# The custom resource of nodes that may hold the supervisor: any but the head's.
SUPERVISED_ON = {"model1_gateway": 0.001}
# That an actor may take to say who it is. One that does not is of no use to anybody.
KNOWN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many there are to be; of expert replicas in each group."""

    attention_workers: int
    expert_replicas: int


class DetachedHandle(SupervisorHandle):
    """The one supervisor of a cluster."""

    @classmethod
    def find_or_create(cls, settings: Settings, num_experts: int) -> "DetachedHandle":
        """The settings of one that is there already stay as they are."""
        remote: Any = ray.remote(DetachedSupervisor)
        handle = remote.options(
            name=SUPERVISOR,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            resources=SUPERVISED_ON,
            runtime_env={"env_vars": COMPUTE_ENVIRONMENT},
        ).remote(settings, num_experts)
        return cls(handle)

    async def apply(self, sizes: Sizes) -> Change | None:
        """None: these were the last to be applied. What was changed by hand since then stays."""
        return await answer("supervisor", self._handle.apply.remote(sizes))

    async def missing(self) -> str | None:
        return await answer("supervisor", self._handle.missing.remote())

    async def end(self) -> None:
        """Stop the deployment, and the supervisor itself."""
        try:
            await self.stop()
        finally:
            ray.kill(self._handle)


class DetachedSupervisor(SupervisorProcess):
    def __init__(self, settings: Settings, num_experts: int) -> None:
        topology = empty_topology(
            settings.topology, num_experts=num_experts, with_kv_stores=settings.kv.enabled
        )
        super().__init__(topology, settings, hosts_with_slots(), detached)
        self._applied: Sizes | None = None
        self._taking_over = asyncio.Lock()
        self._has_taken_over = False

    async def apply(self, sizes: Sizes) -> Change | None:
        await self._there()
        if sizes == self._applied:
            return None
        change = await self._supervisor.changes.resize(
            sizes.attention_workers, sizes.expert_replicas
        )
        self._applied = sizes
        return change

    async def missing(self) -> str | None:
        await self._there()
        return self._supervisor.missing()

    async def snapshot(self) -> Snapshot:
        await self._there()
        return await super().snapshot()

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        await self._there()
        return await super().scale_experts(num_replicas, group)

    async def scale_attention(self, num_workers: int) -> Change:
        await self._there()
        return await super().scale_attention(num_workers)

    async def drain(self, name: str) -> Change:
        await self._there()
        return await super().drain(name)

    async def drain_node(self, node: str) -> Change:
        await self._there()
        return await super().drain_node(node)

    async def stop(self) -> None:
        await self._there()
        await super().stop()

    async def _there(self) -> None:
        """Whoever asks first after a start waits until it is known who is there."""
        async with self._taking_over:
            if not self._has_taken_over:
                await self._supervisor.take_over(await self._found())
                self._has_taken_over = True

    async def _found(self) -> list[Adopted]:
        listed = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = [each["name"] for each in listed if each["namespace"] == NAMESPACE]
        asked = await asyncio.gather(*(self._asked(n) for n in names if n != SUPERVISOR))
        found = [each for each in asked if each]
        log.info("taken_over names=%s", ",".join(each.spec.name for each in found))
        return found

    async def _asked(self, ray_name: str) -> Adopted | None:
        try:
            handle = await asyncio.to_thread(ray.get_actor, ray_name, namespace=NAMESPACE)
        except ValueError:
            return None  # it has just ended
        actor = RemoteActor(ray_name.partition("@")[0], handle)
        try:
            async with asyncio.timeout(KNOWN_SECONDS):
                known = await actor.known()
        except (TimeoutError, DeploymentError) as error:
            log.warning("not_taken_over name=%s why=%s", ray_name, error or "no answer")
            actor.kill()
            return None
        node = self._machines.number_of(known.process.node_id)
        if known.listening is None or node is None:  # it was still to start
            actor.kill()
            return None
        spec = replace(known.spec, node=node)
        return Adopted(spec, actor, known.process, known.listening, known.epoch)


def detached(name: str) -> dict[str, Any]:
    """Of a process of the actor: the next one needs another name, before Ray has forgotten it."""
    unique = f"{name}@{secrets.token_hex(4)}"
    return {"name": unique, "namespace": NAMESPACE, "lifetime": "detached"}
