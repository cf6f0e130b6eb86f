"""A node that nobody answers from is lost, whatever Ray says; one that is only busy is not."""

import asyncio
from dataclasses import replace

from cluster.members import MemberState
from tests.cluster.stage import PATIENCE, Stage, state_of

SILENT_SECONDS = 0.2


def impatient() -> Stage:
    return Stage(patience=replace(PATIENCE, node_seconds=SILENT_SECONDS))


def on_node(stage: Stage, node: int) -> set[str]:
    return {spec.name for spec in stage.topology.actors if spec.node == node}


async def test_all_of_a_silent_node_are_lost_at_once_and_who_computes_moves() -> None:
    stage = impatient()
    async with stage.started() as supervisor:
        there = on_node(stage, 1)
        clock = asyncio.get_running_loop().time
        since = clock()
        stage.silent_nodes.add(1)
        await stage.until("lose node 1")
        assert clock() - since < 3 * SILENT_SECONDS
        assert {f"kill {name}" for name in there} <= set(stage.log)
        await stage.until("serve attention-1", *(f"serve {n}" for n in there if "expert" in n))
        await stage.until_true(lambda: len(stage.workers()) == 2)
        assert {(await state_of(supervisor, n)).spec.node for n in there if "expert" in n} == {0}
        assert stage.peers["attention-1"].router_address == "at-router-0"
        assert (await state_of(supervisor, "router-1")).state is MemberState.DEAD


async def test_gateways_learn_that_what_the_worker_had_is_lost() -> None:
    stage = impatient()
    async with stage.started():
        stage.never_loads = "attention-1"
        stage.silent_nodes.add(1)
        await stage.until("update gateway-0")
        await stage.until_true(lambda: bool(stage.peers["gateway-0"].lost_workers))
        assert stage.peers["gateway-0"].lost_workers == {"at-attention-1"}
        assert stage.workers() == ("at-attention-0",)


async def test_one_that_drains_is_not_lost() -> None:
    stage = impatient()
    async with stage.started() as supervisor:
        await supervisor.changes.drain("attention-1")
        assert stage.peers["gateway-0"].lost_workers == frozenset()


async def test_a_node_where_one_still_answers_is_there() -> None:
    stage = impatient()
    async with stage.started():
        stage.silent = on_node(stage, 1) - {"router-1"}
        await asyncio.sleep(3 * SILENT_SECONDS)
        assert not stage.log
        stage.silent.add("router-1")
        await stage.until("lose node 1")


async def test_the_node_of_the_supervisor_itself_is_never_lost() -> None:
    stage = impatient()
    async with stage.started():
        stage.silent_nodes.add(0)
        await asyncio.sleep(3 * SILENT_SECONDS)
        assert not stage.log
