"""What operators may change of the deployment through a gateway. Whoever runs it does it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Change:
    """Actors that came and went, by name; the epoch of the routing table once that was live."""

    epoch: int
    added: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """A replica loads one expert, or drops it."""

    replica: str
    expert: int
    is_drop: bool


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Moves of experts; the mean over the largest load of the replicas without and with them."""

    epoch: int
    moves: tuple[ExpertMove, ...]
    balance_before: float
    balance_after: float


class Operations(Protocol):
    """Each returns when the change is live. Raises `InvalidRequest` for what cannot be,
    `UnknownActor`, `ChangeRefused`, `ChangeFailed`, and `Unavailable` if nobody is there to do it.
    """

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        """So many replicas of one expert group, or of each."""
        ...

    async def scale_attention(self, num_workers: int) -> Change: ...

    async def drain(self, name: str) -> Change:
        """Take one actor out for good, once it has finished what it has."""
        ...

    async def drain_node(self, node: str) -> Change:
        """Take out whatever runs on the node of this address or id."""

    async def rebalance(self, dry_run: bool) -> Rebalance:
        """Move experts so that all replicas have the same work, or say what would be moved."""
        ...
