"""What a gateway tells about the deployment. Made by whoever runs it; plain values."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from protos import control_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the deployment; the fields are those of model1.v1.Member."""

    name: str
    role: str
    address: str
    pid: int
    node_id: str
    state: str
    requests: int
    expert_group: int | None = None
    restarts: int = 0
    # Its own report, passed on as it came.
    stats: control_pb2.RoleStats = field(default_factory=control_pb2.RoleStats)


@dataclass(frozen=True, slots=True)
class Topology:
    """All members at one epoch of the routing table."""

    epoch: int
    members: tuple[Member, ...]
    autoscaled: tuple[control_pb2.Autoscaled, ...] = ()


TopologySource: TypeAlias = Callable[[], Awaitable[Topology]]
