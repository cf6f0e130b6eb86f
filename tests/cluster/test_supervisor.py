"""A deployment's start, what is watched, and its end."""

import asyncio
from dataclasses import replace

import pytest

from cluster.members import DeploymentError, MemberState, WorkerPlace
from tests.cluster.stage import EVERYBODY, OWN_PROCESS, PATIENCE, REDIS, Stage, state_of


async def test_all_load_before_any_serves_and_callers_serve_after_those_they_call() -> None:
    stage = Stage()
    address = await stage.supervisor().start()
    assert address == "at-gateway-0"
    done = [entry for entry in stage.log if not entry.startswith("create ")]
    loaded, rest = done[: len(EVERYBODY)], done[len(EVERYBODY) :]
    assert sorted(loaded) == [f"load {name}" for name in EVERYBODY]
    served = [entry.removeprefix("serve ") for entry in rest if entry.startswith("serve ")]
    roles = [name.split("-")[0] for name in served]
    assert roles == ["kvstore"] * 2 + ["expert"] * 4 + ["router"] * 2 + ["attention"] * 2 + [
        "gateway"
    ]
    assert served[0] == "kvstore-0"


async def test_each_role_is_told_its_peers() -> None:
    stage = Stage()
    await stage.supervisor().start()
    table = stage.peers["router-0"]
    first, second = ("at-expert-0-0", "at-expert-0-1"), ("at-expert-1-0", "at-expert-1-1")
    assert (table.epoch, table.replicas_of_expert) == (1, (first, first, second, second))
    worker = stage.peers["attention-1"]
    assert (worker.router_address, worker.store_address) == ("at-router-1", "at-kvstore-1")
    stores = (("kvstore-0", "at-kvstore-0"), ("kvstore-1", "at-kvstore-1"))
    gateway = stage.peers["gateway-0"]
    assert gateway.store_addresses == stores
    assert gateway.worker_addresses == (
        WorkerPlace("attention-0", "at-attention-0", "kvstore-0", 77),
        WorkerPlace("attention-1", "at-attention-1", "kvstore-1", 77),
    )


async def test_the_stores_learn_of_each_other_and_share_the_redis_of_the_first() -> None:
    stage = Stage()
    await stage.supervisor().start()
    first, second = stage.peers["kvstore-0"], stage.peers["kvstore-1"]
    assert first.store_addresses == (("kvstore-1", "at-kvstore-1"),)
    assert second.store_addresses == (("kvstore-0", "at-kvstore-0"),)
    assert first.redis == second.redis == REDIS
    assert "hush" not in repr(second)


@pytest.mark.parametrize(
    ("stage", "start_seconds", "message"),
    [
        (Stage(fails_to_load="expert-1-0"), 30, "expert-1-0: no such file"),
        (Stage(fails_to_serve="gateway-0"), 30, "gateway-0: port in use"),
        (Stage(never_loads="router-0"), 0.2, r"router-0.* did not start within 0\.2 s"),
    ],
)
async def test_one_failure_ends_everything_and_is_told(
    stage: Stage, start_seconds: float, message: str
) -> None:
    stage.patience = replace(PATIENCE, start_seconds=start_seconds)
    with pytest.raises(DeploymentError, match=message):
        await stage.supervisor().start()
    assert sorted(stage.killed) == EVERYBODY


async def test_those_who_serve_already_are_told_to_stop_when_another_fails() -> None:
    stage = Stage(fails_to_serve="attention-1")
    with pytest.raises(DeploymentError, match="attention-1: port in use"):
        await stage.supervisor().start()
    stopped = {line.removeprefix("stop ") for line in stage.log if line.startswith("stop ")}
    assert {"kvstore-0", "expert-0-0", "router-0"} <= stopped
    assert "attention-1" not in stopped


async def test_a_start_can_be_stopped_on_its_way() -> None:
    stage = Stage(never_serves="attention-0")
    supervisor = stage.supervisor()
    starting = asyncio.create_task(supervisor.start())
    await stage.until("serve kvstore-0", "serve attention-1")
    async with asyncio.timeout(30):
        await supervisor.stop()
    assert "stop kvstore-0" in stage.log
    assert "stop attention-0" not in stage.log
    assert sorted(stage.killed) == EVERYBODY
    with pytest.raises(DeploymentError, match="attention-0 died"):
        await starting


async def test_a_snapshot_has_every_member_with_its_counts() -> None:
    async with Stage().started() as supervisor:
        snapshot = await supervisor.snapshot()
    assert sorted(member.spec.name for member in snapshot.members) == EVERYBODY
    assert {member.stats.requests for member in snapshot.members} == {7}
    assert {member.state for member in snapshot.members} == {MemberState.READY}
    assert snapshot.supervisor == OWN_PROCESS


async def test_a_busy_actor_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.roster.ANSWER_TIMEOUT_SECONDS", 0.05)
    stage = Stage()
    async with stage.started() as supervisor:
        stage.busy.add("attention-0")
        assert (await state_of(supervisor, "attention-0")).state is MemberState.READY


async def test_a_store_that_does_not_come_back_does_not_end_the_deployment() -> None:
    stage = Stage(patience=replace(PATIENCE, restart_seconds=0.001))
    async with stage.started() as supervisor:
        watching = asyncio.create_task(supervisor.watch())
        stage.fails_to_load = "kvstore-0"
        stage.kill("kvstore-0")
        await stage.until_true(lambda: stage.num_processes("kvstore-0") == 3)
        assert (await state_of(supervisor, "kvstore-0")).state is not MemberState.READY
        assert not watching.done()
        watching.cancel()


async def test_serving_ends_when_a_group_is_gone_and_no_restart_helps() -> None:
    stage = Stage(patience=replace(PATIENCE, restart_seconds=0.2))
    async with stage.started() as supervisor:
        watching = asyncio.create_task(supervisor.watch())
        stage.fails_to_load = "expert-0-0"
        stage.kill("expert-0-0")
        await stage.until("fail expert-0-0")
        assert not watching.done()  # the other replica serves
        stage.never_loads = "expert-0-1"
        stage.kill("expert-0-1")
        async with asyncio.timeout(30):
            why = await watching
    assert why == "no replica of expert group 0 is alive, and no restart helped in 0.2 s"


async def test_callers_stop_before_those_they_call_and_the_dead_are_passed_over() -> None:
    stage = Stage()
    supervisor = stage.supervisor()
    await supervisor.start()
    stage.never_loads = "router-0"
    stage.kill("router-0")
    await stage.until_true(lambda: stage.num_processes("router-0") == 2)
    stage.log.clear()
    await supervisor.stop(grace_seconds=1)
    stopped = [line.removeprefix("stop ") for line in stage.log if line.startswith("stop ")]
    assert stopped[0] == "gateway-0"
    assert sorted(stopped[1:3]) == ["attention-0", "attention-1"]
    assert stopped[3] == "router-1"
    assert sorted(stopped[4:-2]) == [name for name in EVERYBODY if "expert" in name]
    assert sorted(stopped[-2:]) == ["kvstore-0", "kvstore-1"]
    assert sorted(stage.killed) == EVERYBODY
