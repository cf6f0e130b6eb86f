"""Processes that wait for somebody to die."""

import asyncio

import pytest

from cluster import spares as spares_module
from cluster.spares import Spares
from cluster.topology import ActorSpec, Role

ROUTERS = [ActorSpec(f"router-{node}", Role.ROUTER, node) for node in range(2)]
EXPERT = ActorSpec("expert-0-0", Role.EXPERT, 0)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares_module, "DELAY_SECONDS", 0.0)


async def replenished(spares: Spares, *specs: ActorSpec) -> None:
    for spec in specs:
        spares.replenish(spec)
    await asyncio.sleep(0.01)


async def test_one_waits_for_each_role_and_node_and_is_taken_once() -> None:
    started: list[ActorSpec] = []

    def start(spec: ActorSpec) -> str:
        started.append(spec)
        return f"process {len(started)}"

    spares = Spares({Role.ROUTER}, start)
    assert spares.take(ROUTERS[0]) is None
    await replenished(spares, ROUTERS[0], ROUTERS[0], ROUTERS[1], EXPERT)
    assert started == ROUTERS
    assert spares.take(EXPERT) is None
    assert spares.take(ROUTERS[1]) == "process 2"
    assert spares.take(ROUTERS[1]) is None
    await replenished(spares, ROUTERS[1])
    assert spares.take(ROUTERS[1]) == "process 3"
    assert spares.take(ROUTERS[0]) == "process 1"
