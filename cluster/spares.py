"""Processes that wait for an actor to die: up, and with everything imported that its role needs.

One for a role and a node, made once somebody of that role serves there. Whoever is created takes it
if there is one, which saves the seconds that a process of Ray's takes to start. Knows no Ray.
"""

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from cluster.topology import ActorSpec, Role

# After somebody has begun to serve: the others of a deployment may be about to.
DELAY_SECONDS = 1.0


class Spares:
    def __init__(self, roles: Collection[Role], start: Callable[[ActorSpec], Any]) -> None:
        """`start` makes another process for such an actor, and lets it prepare."""
        self._roles = roles
        self._start = start
        self._waiting: dict[tuple[Role, int], Any] = {}

    def take(self, spec: ActorSpec) -> Any | None:
        """What `start` returned; nobody else gets it."""
        return self._waiting.pop((spec.role, spec.node), None)

    def replenish(self, spec: ActorSpec) -> None:
        """Soon there is one for the next of this role on this node."""
        if spec.role in self._roles:
            asyncio.get_running_loop().call_later(DELAY_SECONDS, self._make, spec)

    def _make(self, spec: ActorSpec) -> None:
        if (spec.role, spec.node) not in self._waiting:
            self._waiting[spec.role, spec.node] = self._start(spec)
