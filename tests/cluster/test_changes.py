"""Actors that come and go while the deployment serves."""

import asyncio
from dataclasses import replace

import pytest

from cluster.config import TopologySettings
from cluster.members import (
    Change,
    ChangeFailed,
    ChangeInvalid,
    ChangeRefused,
    Listening,
    MemberState,
    UnknownActor,
)
from cluster.roster import Adopted
from cluster.topology import Role, Room, plan_topology
from tests.cluster.stage import EVERYBODY, PATIENCE, Stage, state_of

SMALL = plan_topology(TopologySettings(expert_groups=2), num_experts=4)


async def test_new_replicas_load_and_serve_before_any_router_hears_of_them() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        change = await supervisor.changes.scale_experts(3, None)
        assert change == Change(2, added=("expert-0-2", "expert-1-2"))
        told = stage.log.index("update router-0")
        assert {"serve expert-0-2", "serve expert-1-2"} <= set(stage.log[:told])
        assert stage.replicas(0) == ("at-expert-0-0", "at-expert-0-1", "at-expert-0-2")
        assert stage.peers["router-1"].epoch == 2


async def test_nothing_is_asked_of_attention_workers_when_experts_scale() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        await supervisor.changes.scale_experts(4, None)
        await supervisor.changes.scale_experts(1, None)
        assert not [entry for entry in stage.log if "attention" in entry or "gateway" in entry]
        assert stage.num_processes("attention-0") == 1


async def test_routers_forget_a_replica_before_it_drains_and_it_drains_before_it_ends() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        change = await supervisor.changes.scale_experts(1, group=1)
        assert change == Change(2, removed=("expert-1-1",))
        wanted = ["update router-0", "stop expert-1-1", "kill expert-1-1"]
        assert [entry for entry in stage.log if entry in wanted] == wanted
        assert "update router-1" in stage.log[: stage.log.index("stop expert-1-1")]
        assert stage.replicas(1) == ("at-expert-1-0",)
        assert len(stage.replicas(0)) == 2
        names = {member.spec.name for member in (await supervisor.snapshot()).members}
        assert names == set(EVERYBODY) - {"expert-1-1"}


async def test_whoever_is_added_loads_behind_those_who_serve() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        assert set(stage.gentle.values()) == {False}
        await supervisor.changes.scale_experts(3, group=0)
        stage.kill("expert-1-0")
        await stage.until("serve expert-1-0")
        assert stage.gentle["expert-0-2"]
        assert stage.gentle["expert-1-0"]  # the other one of its group serves meanwhile


async def test_one_group_alone_is_scaled() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        change = await supervisor.changes.scale_experts(3, group=0)
        assert change.added == ("expert-0-2",)


async def test_a_scale_to_what_there_is_changes_nothing() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        assert await supervisor.changes.scale_experts(2, None) == Change(1)
        assert await supervisor.changes.scale_attention(2) == Change(1)
        assert stage.log == []


async def test_names_are_used_again_and_processes_are_not() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        for _ in range(3):
            await supervisor.changes.scale_experts(3, group=0)
            await supervisor.changes.scale_experts(1, group=0)
        assert stage.num_processes("expert-0-2") == 3
        assert stage.replicas(0) == ("at-expert-0-0",)


@pytest.mark.parametrize("which", ["fails_to_load", "fails_to_serve", "never_loads"])
async def test_a_replica_that_cannot_start_leaves_everything_as_it_was(which: str) -> None:
    stage = Stage(patience=replace(PATIENCE, start_seconds=0.5))
    async with stage.started() as supervisor:
        setattr(stage, which, "expert-1-2")
        with pytest.raises(ChangeFailed, match=r"expert-1-2.*nothing has changed"):
            await supervisor.changes.scale_experts(3, None)
        assert not [entry for entry in stage.log if entry.startswith("update ")]
        assert {"expert-0-2", "expert-1-2"} <= stage.killed
        names = [member.spec.name for member in (await supervisor.snapshot()).members]
        assert sorted(names) == EVERYBODY
        setattr(stage, which, "")
        assert (await supervisor.changes.scale_experts(3, None)).epoch == 2


async def test_changes_wait_for_each_other() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        changes = supervisor.changes
        both = await asyncio.gather(
            changes.scale_experts(4, group=0), changes.scale_experts(1, group=0)
        )
        assert both[0].added == ("expert-0-2", "expert-0-3")
        assert both[1].removed == ("expert-0-3", "expert-0-2", "expert-0-1")
        assert (both[0].epoch, both[1].epoch) == (2, 3)


async def test_a_caller_that_leaves_does_not_stop_a_change() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.never_loads = "expert-0-2"
        asked = asyncio.create_task(supervisor.changes.scale_experts(3, group=0))
        await stage.until("create expert-0-2")
        asked.cancel()
        after = asyncio.create_task(supervisor.changes.scale_experts(1, group=1))
        stage.kill("expert-0-2")  # and so the first change fails
        assert (await after).removed == ("expert-1-1",)


async def test_a_deployment_that_stops_ends_the_change_under_way_and_those_that_wait() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.never_loads = "expert-0-2"
        under_way = asyncio.create_task(supervisor.changes.scale_experts(3, group=0))
        await stage.until("create expert-0-2")
        waiting = asyncio.create_task(supervisor.changes.drain("expert-1-1"))
        await asyncio.sleep(0)
        await supervisor.stop()
        for each in (under_way, waiting, supervisor.changes.scale_experts(2, None)):
            with pytest.raises(ChangeFailed, match="the deployment is stopping"):
                await each
        assert "expert-0-2" in stage.killed


async def test_a_loss_during_a_change_is_published_without_waiting_for_it() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.never_serves = "expert-0-2"
        growing = asyncio.create_task(supervisor.changes.scale_experts(3, group=0))
        await stage.until("load expert-0-2")
        stage.kill("expert-1-1")
        await stage.until("serve expert-1-1")
        await stage.until_true(lambda: stage.peers["router-0"].epoch == 3)
        assert len(stage.replicas(0)) == 2  # the new one is not published with it
        stage.kill("expert-0-2")
        with pytest.raises(ChangeFailed, match="expert-0-2 died"):
            await growing


async def test_a_replica_that_was_added_is_kept_alive_and_one_that_was_removed_is_not() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        await supervisor.changes.scale_experts(3, group=0)
        stage.kill("expert-0-2")
        await stage.until_true(lambda: stage.num_processes("expert-0-2") == 2)
        await supervisor.changes.drain("expert-0-2")
        await supervisor.changes.scale_experts(2, group=1)
        assert stage.num_processes("expert-0-2") == 2


async def test_scaling_down_takes_those_first_that_do_not_serve() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        stage.never_loads = "expert-0-0"
        stage.kill("expert-0-0")
        await stage.until_true(lambda: stage.num_processes("expert-0-0") == 2)
        change = await supervisor.changes.scale_experts(1, group=0)
        assert change.removed == ("expert-0-0",)
        assert stage.replicas(0) == ("at-expert-0-1",)
        assert "stop expert-0-0" not in stage.log


async def test_one_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.roster.STOP_MARGIN_SECONDS", 0.05)
    stage = Stage(never_stops="expert-0-1", patience=replace(PATIENCE, drain_seconds=0))
    async with stage.started() as supervisor:
        assert (await supervisor.changes.drain("expert-0-1")).removed == ("expert-0-1",)
        assert "expert-0-1" in stage.killed


async def test_a_worker_joins_once_it_serves_and_leaves_before_it_drains() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        change = await supervisor.changes.scale_attention(3)
        assert change == Change(1, added=("attention-2",))
        assert stage.log[-2:] == ["serve attention-2", "update gateway-0"]
        assert "at-attention-2" in stage.workers()
        change = await supervisor.changes.scale_attention(1)
        assert change.removed == ("attention-2", "attention-1")
        told = stage.log.index("update gateway-0", stage.log.index("update gateway-0") + 1)
        assert set(stage.log[told + 1 :]) >= {"stop attention-2", "stop attention-1"}
        assert stage.workers() == ("at-attention-0",)


async def test_a_worker_on_a_new_node_gets_a_router_and_a_store() -> None:
    stage = Stage(topology=SMALL, rooms_now=(Room(), Room()))
    async with stage.started() as supervisor:
        change = await supervisor.changes.scale_attention(2)
        assert change.added == ("attention-1", "router-1", "kvstore-1")
        served = [entry for entry in stage.log if entry.startswith("serve ")]
        assert served == ["serve kvstore-1", "serve router-1", "serve attention-1"]
        assert stage.peers["attention-1"].router_address == "at-router-1"
        assert stage.peers["router-1"].replicas_of_expert[0] == ("at-expert-0-0",)
        assert stage.peers["kvstore-0"].store_addresses == (("kvstore-1", "at-kvstore-1"),)
        assert len(stage.peers["gateway-0"].store_addresses) == 2
        assert (await supervisor.changes.drain("attention-1")).removed == ("attention-1",)
        assert (await state_of(supervisor, "kvstore-1")).state is MemberState.READY


async def test_a_failed_worker_takes_its_router_and_store_along() -> None:
    stage = Stage(topology=SMALL, rooms_now=(Room(), Room()))
    async with stage.started() as supervisor:
        stage.fails_to_serve = "attention-1"
        with pytest.raises(ChangeFailed, match="attention-1: port in use"):
            await supervisor.changes.scale_attention(2)
        assert {"stop kvstore-1", "stop router-1"} <= set(stage.log)
        assert {"attention-1", "router-1", "kvstore-1"} <= stage.killed
        assert stage.peers["kvstore-0"].store_addresses == ()


async def test_what_cannot_be_is_refused_by_its_number() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        changes = supervisor.changes
        with pytest.raises(ChangeInvalid, match="replicas must be from 1 to 1024, not 0"):
            await changes.scale_experts(0, None)
        with pytest.raises(ChangeInvalid, match=r"attention workers must be .*, not 2000"):
            await changes.scale_attention(2000)
        with pytest.raises(ChangeInvalid, match=r"expert group 2: the deployment has .* 0 to 1"):
            await changes.scale_experts(1, 2)
        assert stage.log == []


async def test_drain_refuses_what_would_end_serving() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        changes = supervisor.changes
        with pytest.raises(UnknownActor, match="no actor is called 'expert-9-9'; there are gate"):
            await changes.drain("expert-9-9")
        with pytest.raises(ChangeRefused, match="router-0 is a router: what can be drained are"):
            await changes.drain("router-0")
        await changes.drain("expert-0-0")
        with pytest.raises(ChangeRefused, match="expert-0-1 is the last of expert group 0"):
            await changes.drain("expert-0-1")
        stage.never_loads = "expert-1-0"
        stage.kill("expert-1-0")
        await stage.until_true(lambda: stage.replicas(1) == ("at-expert-1-1",))
        with pytest.raises(ChangeRefused, match="expert-1-1 is the only one of expert group 1 th"):
            await changes.drain("expert-1-1")
        await changes.drain("expert-1-0")  # the one that does not serve may go
        await changes.drain("attention-0")
        with pytest.raises(ChangeRefused, match="attention-1 is the last of the attention work"):
            await changes.drain("attention-1")


def slots(*num_experts: int) -> tuple[Room, ...]:
    return tuple(Room(slots={Role.EXPERT: count, Role.ATTENTION: 1}) for count in num_experts)


async def test_a_cluster_that_grows_is_waited_for() -> None:
    stage = Stage(topology=SMALL, rooms_now=slots(3), rooms_later=slots(3, 1))
    async with stage.started() as supervisor:
        change = await supervisor.changes.scale_experts(2, None)
        assert change.added == ("expert-0-1", "expert-1-1")
        assert stage.log[0] == "wait for 2 expert"
        nodes = [(await state_of(supervisor, name)).spec.node for name in change.added]
        assert sorted(nodes) == [0, 1]


async def test_a_cluster_that_does_not_grow_changes_nothing() -> None:
    stage = Stage(topology=SMALL, rooms_now=slots(3))
    async with stage.started() as supervisor:
        with pytest.raises(ChangeFailed, match="no node had 2 more"):
            await supervisor.changes.scale_experts(2, None)
        assert stage.log == ["wait for 2 expert"]
        stage.rooms_later = slots(3)  # somebody else has taken it meanwhile
        with pytest.raises(ChangeFailed, match="no node has a free expert_slot"):
            await supervisor.changes.scale_experts(2, None)


async def test_a_node_is_drained_after_replacements_and_callers_before_whom_they_call() -> None:
    stage = Stage(rooms_now=(Room(), Room(), Room()))
    async with stage.started() as supervisor:
        there = {spec.name for spec in stage.topology.actors if spec.node == 1}
        change = await supervisor.changes.drain_node("node-1")
        assert set(change.removed) == there
        assert {"attention-2", "router-2", "kvstore-2"} <= set(change.added)
        stopped = [entry.removeprefix("stop ") for entry in stage.log if entry[:5] == "stop "]
        assert stopped[-2:] == ["router-1", "kvstore-1"]
        first = stage.log.index(f"stop {stopped[0]}")
        assert {f"serve {name}" for name in change.added} <= set(stage.log[:first])
        assert sorted(stage.workers()) == ["at-attention-0", "at-attention-2"]
        members = (await supervisor.snapshot()).members
        assert len([m for m in members if m.spec.role is Role.EXPERT]) == 4
        assert {m.spec.node for m in members} == {0, 2}
        assert await supervisor.changes.drain_node("node-1") == Change(change.epoch)
        assert await supervisor.changes.drain_node("nowhere") == Change(change.epoch)


async def test_whoever_finds_no_place_when_its_node_drains_comes_back_with_the_next_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.changes.RESTORE_SECONDS", 0.01)
    full = Room(slots={Role.ATTENTION: 1, Role.EXPERT: 2})
    stage = Stage(rooms_now=(full, full))
    async with stage.started() as supervisor:
        change = await supervisor.changes.drain_node("node-1")
        assert change.added == ()
        assert stage.workers() == ("at-attention-0",)
        stage.rooms_now = (*stage.rooms_now, full)
        await stage.until_true(lambda: len(stage.workers()) == 2)
        await stage.until_true(lambda: len(stage.replicas(0)) == len(stage.replicas(1)) == 2)


async def test_what_nobody_else_does_is_waited_for_before_its_node_drains() -> None:
    full = Room(slots={Role.ATTENTION: 1, Role.EXPERT: 4})
    stage = Stage(topology=SMALL, rooms_now=(full,))
    async with stage.started() as supervisor:
        with pytest.raises(ChangeRefused, match="gateway-0 is the only gateway"):
            await supervisor.changes.drain_node("node-0")
        assert stage.replicas(0) == ("at-expert-0-0",)


async def test_another_supervisor_takes_over_who_serves() -> None:
    stage = Stage()
    async with stage.started() as supervisor:
        await supervisor.changes.scale_experts(1, group=0)
        found = [
            Adopted(
                member.spec,
                stage.create(member.spec),
                member.process,
                Listening(member.address, kv_tokens=77),
                epoch=5,
            )
            for member in (await supervisor.snapshot()).members
            if member.spec.name != "expert-1-1"  # which has died
        ]
    second = replace(stage, topology=stage.topology.without(EVERYBODY)).supervisor()
    stage.log.clear()
    await second.take_over(found)
    assert not [entry for entry in stage.log if entry.split()[0] in ("load", "serve", "kill")]
    assert stage.peers["router-0"].epoch == 6
    change = await second.changes.resize(2, 2)
    assert change.added == ("expert-0-1", "expert-1-1")
    stage.kill("attention-0")
    await stage.until("serve attention-0")
    await second.stop()


async def test_the_first_sizes_start_every_role_at_once() -> None:
    stage = Stage(
        topology=SMALL.without([spec.name for spec in SMALL.actors]),
        rooms_now=(),
        rooms_later=slots(3, 1),
    )
    supervisor = stage.supervisor()
    await supervisor.take_over([])
    change = await supervisor.changes.resize(2, 2)
    assert len([name for name in change.added if name.startswith("expert-")]) == 4
    assert supervisor.missing() is None
    assert (await supervisor.changes.resize(2, 1)).removed == ("expert-0-1", "expert-1-1")
    await supervisor.stop()
