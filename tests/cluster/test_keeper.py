"""Whoever dies is known to be gone at once, and comes back."""

import asyncio
from dataclasses import replace

from cluster.backoff import RestartPolicy
from cluster.members import MemberState
from cluster.topology import Role, Room
from tests.cluster.stage import PATIENCE, REDIS, Stage, state_of


async def test_the_loss_of_a_replica_is_published_before_another_process_has_loaded() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.never_loads = "expert-0-1"
        stage.kill("expert-0-1")
        await stage.until("update router-0", "update router-1")
        assert stage.replicas(0) == ("at-expert-0-0",)
        assert stage.peers["router-0"].epoch == stage.peers["router-1"].epoch == 2
        assert (await state_of(supervisor, "expert-0-1")).state is MemberState.STARTING


async def test_a_replica_comes_back_under_its_name_at_another_address() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.kill("expert-0-1")
        await stage.until_true(lambda: stage.peers["router-0"].epoch == 3)
        assert stage.replicas(0) == ("at-expert-0-0", "at-expert-0-1-again-1")
        member = await state_of(supervisor, "expert-0-1")
        assert (member.state, member.restarts) == (MemberState.READY, 1)
        assert "update attention-0" not in stage.log


async def test_the_table_has_an_empty_group_while_its_only_replicas_are_gone() -> None:
    stage = Stage()
    async with stage.started():
        stage.never_loads = "expert-1-0"
        stage.kill("expert-1-0")
        stage.fails_to_load = "expert-1-1"
        stage.kill("expert-1-1")
        await stage.until_true(lambda: stage.replicas(1) == ())
        assert len(stage.peers["router-0"].replicas_of_expert) == 4


async def test_a_worker_comes_back_and_the_gateway_learns_both() -> None:
    stage = Stage()
    async with stage.started():
        stage.never_loads = "attention-1"
        stage.kill("attention-1")
        await stage.until("update gateway-0")
        assert stage.workers() == ("at-attention-0",)
        stage.never_loads = ""
        stage.kill("attention-1")  # the one that never loads
        await stage.until_true(lambda: len(stage.workers()) == 2)
        assert stage.workers()[1].startswith("at-attention-1-again-")
        assert "update router-0" not in stage.log  # routing is not concerned


async def test_a_router_comes_back_where_it_was_with_the_table_of_now() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.never_serves = "router-1"
        stage.kill("router-1")
        await stage.until("load router-1")
        stage.never_loads = "expert-0-1"
        stage.kill("expert-0-1")
        await stage.until("update router-0")
        stage.never_serves = ""
        stage.kill("router-1")
        await stage.until("serve router-1")
        assert (await state_of(supervisor, "router-1")).address == "at-router-1"
        peers = stage.peers["router-1"]
        assert (peers.last_address, peers.epoch) == ("at-router-1", 2)


async def test_a_router_that_missed_an_epoch_while_it_started_is_told_it() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.kill("router-1")
        await stage.until("serve router-1")
        await supervisor.changes.drain("expert-0-1")
        assert stage.peers["router-1"].epoch == stage.peers["router-0"].epoch == 2


async def test_the_gateway_comes_back_where_it_was() -> None:
    stage = Stage()
    async with stage.started():
        stage.kill("gateway-0")
        await stage.until("serve gateway-0")
        assert stage.peers["gateway-0"].last_address == "at-gateway-0"
        assert len(stage.workers()) == 2


async def test_a_store_comes_back_where_it_was_and_knows_the_redis_it_had() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.kill("kvstore-0")
        await stage.until("serve kvstore-0")
        peers = stage.peers["kvstore-0"]
        assert (peers.last_address, peers.redis) == ("at-kvstore-0", REDIS)
        assert peers.store_addresses == (("kvstore-1", "at-kvstore-1"),)
        assert (await state_of(supervisor, "kvstore-0")).restarts == 1
        assert "update attention-0" not in stage.log  # found where it was


async def test_what_keeps_failing_is_tried_again_and_counted() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.fails_to_load = "expert-0-1"
        stage.kill("expert-0-1")
        await stage.until_true(lambda: stage.log.count("fail expert-0-1") == 3)
        stage.fails_to_load = ""
        await stage.until("serve expert-0-1")
        assert (await state_of(supervisor, "expert-0-1")).restarts >= 4


async def test_a_crash_loop_waits_longer_each_time() -> None:
    slowly = RestartPolicy(first_delay_seconds=600, max_delay_seconds=600)
    stage = Stage(patience=replace(PATIENCE, restarts=slowly))
    async with stage.started() as supervisor:
        stage.fails_to_load = "expert-0-1"
        stage.kill("expert-0-1")
        await stage.until("fail expert-0-1", "kill expert-0-1")
        await asyncio.sleep(0)
        member = await state_of(supervisor, "expert-0-1")
        assert (member.state, member.restarts) == (MemberState.DEAD, 1)


async def test_one_that_does_not_start_in_time_is_given_up_and_tried_again() -> None:
    stage = Stage(patience=replace(PATIENCE, start_seconds=0.5))
    async with stage.started():
        stage.never_loads = "expert-0-1"
        stage.kill("expert-0-1")
        await stage.until_true(lambda: stage.num_processes("expert-0-1") == 3)
        stage.never_loads = ""
        await stage.until("serve expert-0-1")


async def test_a_replica_whose_node_is_gone_comes_back_on_another() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        [node] = {s.node for s in stage.topology.actors if s.name == "expert-0-1"}
        rooms = [Room(), Room()]
        rooms[node] = Room(is_alive=False)
        stage.rooms_now = tuple(rooms)
        stage.kill("expert-0-1")
        await stage.until("serve expert-0-1")
        member = await state_of(supervisor, "expert-0-1")
        assert member.spec.node == 1 - node
        assert member.process.node_id == f"node-{1 - node}"


async def test_a_worker_whose_node_is_gone_moves_to_one_that_has_no_router_yet() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.rooms_now = (Room(slots={Role.ATTENTION: 1}), Room(is_alive=False), Room())
        stage.kill("attention-1")
        await stage.until("update gateway-0", "serve attention-1")
        await stage.until_true(lambda: len(stage.workers()) == 2)
        assert {"serve router-2", "serve kvstore-2"} <= set(stage.log)
        assert (await state_of(supervisor, "attention-1")).spec.node == 2
        assert stage.peers["attention-1"].router_address == "at-router-2"
        stage.kill("router-2")  # kept from now on, as all others are
        await stage.until_true(lambda: stage.num_processes("router-2") == 2)


async def test_a_router_waits_for_its_node() -> None:
    stage = Stage()
    async with stage.started():
        stage.rooms_now = (Room(), Room(is_alive=False))
        stage.kill("router-1")
        await asyncio.sleep(0.05)
        assert stage.num_processes("router-1") == 1
        stage.rooms_now = (Room(), Room())
        await stage.until("serve router-1")


async def test_who_has_a_stand_in_loads_behind_those_who_serve() -> None:
    stage = Stage()
    async with stage.started():
        stage.kill("expert-0-1")
        await stage.until("serve expert-0-1")
        assert stage.gentle["expert-0-1"]
        stage.never_loads = "expert-0-0"
        stage.kill("expert-0-0")
        await stage.until_true(lambda: stage.replicas(0) == ("at-expert-0-1-again-1",))
        stage.kill("expert-0-1")
        await stage.until_true(lambda: stage.log.count("serve expert-0-1") == 2)
        assert not stage.gentle["expert-0-1"]


async def test_a_router_that_cannot_be_told_holds_up_nobody() -> None:
    stage = Stage()
    async with stage.started():
        stage.refuses_updates = "router-0"
        stage.kill("expert-0-1")
        await stage.until("serve expert-0-1")
        await stage.until_true(lambda: stage.peers["router-1"].epoch == 3)
        assert stage.peers["router-0"].epoch == 1
        stage.refuses_updates = ""
        stage.kill("expert-1-1")
        await stage.until_true(lambda: stage.peers["router-0"].epoch >= 4)


async def test_nobody_is_started_again_while_the_deployment_stops() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        await supervisor.stop()
        assert not [entry for entry in stage.log if entry.startswith("create ")]
