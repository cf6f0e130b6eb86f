"""A running deployment as a context: everything is up inside, and nothing is left afterwards.

What `serve`, `demo` and the benchmarks share. Prints nothing and handles no signal.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config import Settings
from cluster.preflight import check_addresses, check_secrets, checked_model
from cluster.ray_session import Hosts, ray_session
from cluster.topology import plan_topology

if TYPE_CHECKING:
    from cluster.actors import SupervisorHandle


@dataclass(frozen=True, slots=True)
class Site:
    """A checked wish and the nodes to fulfil it on; Ray is connected while it exists."""

    settings: Settings
    num_experts: int
    hosts: Hosts


@dataclass(frozen=True, slots=True)
class Deployment:
    endpoint: str
    supervisor: "SupervisorHandle"


@contextmanager
def prepared(settings: Settings) -> Iterator[Site]:
    """Check what can be checked, then connect to Ray. Blocks: open it outside of any event loop,
    because Ray takes over the signal handlers while it starts."""
    num_experts = checked_model(settings.model).n_routed_experts
    topology = plan_topology(
        settings.topology, num_experts=num_experts, with_kv_stores=settings.kv.enabled
    )
    if settings.cluster.ray_address is None:
        check_secrets(settings)  # elsewhere each node has its own
    check_addresses(settings.gateway)
    supervisor_too = len(topology.actors) + 1
    with ray_session(settings.cluster, num_actors=supervisor_too) as hosts:
        yield Site(settings, num_experts, hosts)


@asynccontextmanager
async def deployed(site: Site) -> AsyncIterator[Deployment]:
    """Raises `DeploymentError` if a role fails to start. On the way out, also of a start that was
    interrupted, the requests under way get the drain time to finish."""
    from cluster.actors import SupervisorHandle  # imports Ray, which takes half a second

    topology = plan_topology(
        site.settings.topology,
        num_experts=site.num_experts,
        rooms=site.hosts.rooms,
        with_kv_stores=site.settings.kv.enabled,
    )
    supervisor = SupervisorHandle.create(topology, site.settings, site.hosts)
    try:
        yield Deployment(await supervisor.start(), supervisor)
    finally:
        await supervisor.stop()
