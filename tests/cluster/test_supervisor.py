"""The supervisor with actors that live in this process and do as the test says."""

import asyncio
from dataclasses import dataclass, field

import pytest

from cluster.config import TopologySettings
from cluster.members import (
    ActorDied,
    DeploymentError,
    Listening,
    MemberState,
    Peers,
    Process,
    Redis,
    WorkerPlace,
)
from cluster.supervisor import Supervisor
from cluster.topology import ActorSpec, plan_topology

OWN_PROCESS = Process(1, "node")
REDIS = Redis("redis://here:1", "hush")
TOPOLOGY = plan_topology(
    TopologySettings(attention_workers=2, expert_groups=2, expert_replicas=2),
    num_experts=4,
    num_nodes=2,
)


@dataclass
class Stage:
    """What all actors of a test share: the log of what happened, and who misbehaves."""

    log: list[str] = field(default_factory=list)
    peers: dict[str, Peers] = field(default_factory=dict)
    fails_to_load: str = ""
    fails_to_serve: str = ""
    never_loads: str = ""
    never_serves: str = ""
    dead: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    killed: list[str] = field(default_factory=list)

    def create(self, spec: ActorSpec) -> "StagedActor":
        return StagedActor(self, spec.name)

    def supervisor(self) -> Supervisor:
        return Supervisor(TOPOLOGY, self.create, OWN_PROCESS)


@dataclass
class StagedActor:
    stage: Stage
    name: str

    async def load(self) -> Process:
        if self.name == self.stage.fails_to_load:
            raise DeploymentError(f"{self.name}: no such file")
        if self.name == self.stage.never_loads:
            await asyncio.Event().wait()
        self.stage.log.append(f"load {self.name}")
        return Process(100 + len(self.stage.log), "node")

    async def serve(self, peers: Peers) -> Listening:
        if self.name == self.stage.fails_to_serve:
            raise DeploymentError(f"{self.name}: port in use")
        if self.name == self.stage.never_serves:
            await asyncio.Event().wait()
        self.stage.log.append(f"serve {self.name}")
        self.stage.peers[self.name] = peers
        redis = REDIS if self.name == "kvstore-0" else None
        return Listening(f"at-{self.name}", kv_tokens=77, redis=redis)

    async def update(self, peers: Peers) -> None:
        self.stage.log.append(f"update {self.name}")
        self.stage.peers[self.name] = peers

    async def num_requests(self) -> int:
        if self.name in self.stage.dead:
            raise ActorDied(f"{self.name} died")
        if self.name in self.stage.busy:
            await asyncio.Event().wait()
        return 7

    async def stop(self, grace_seconds: float) -> None:
        if self.name in self.stage.dead:
            raise ActorDied(f"{self.name} died")
        self.stage.log.append(f"stop {self.name}")

    def kill(self) -> None:
        self.stage.killed.append(self.name)


EVERYBODY = sorted(spec.name for spec in TOPOLOGY.actors)


async def test_all_load_before_any_serves_and_callers_serve_after_those_they_call() -> None:
    stage = Stage()
    address = await stage.supervisor().start(timeout_seconds=30)
    assert address == "at-gateway-0"
    loaded, rest = stage.log[: len(EVERYBODY)], stage.log[len(EVERYBODY) :]
    assert sorted(loaded) == [f"load {name}" for name in EVERYBODY]
    served = [entry.removeprefix("serve ") for entry in rest if entry.startswith("serve ")]
    roles = [name.split("-")[0] for name in served]
    assert roles == ["kvstore"] * 2 + ["expert"] * 4 + ["router"] * 2 + ["attention"] * 2 + [
        "gateway"
    ]
    assert served[0] == "kvstore-0"


async def test_each_role_is_told_its_peers() -> None:
    stage = Stage()
    await stage.supervisor().start(timeout_seconds=30)
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
    await stage.supervisor().start(timeout_seconds=30)
    assert stage.log[-2:] == ["update kvstore-0", "update kvstore-1"]
    first, second = stage.peers["kvstore-0"], stage.peers["kvstore-1"]
    assert first.store_addresses == (("kvstore-1", "at-kvstore-1"),)
    assert second.store_addresses == (("kvstore-0", "at-kvstore-0"),)
    assert first.redis == second.redis == REDIS
    assert "hush" not in repr(second)


async def test_a_lost_store_does_not_end_the_deployment() -> None:
    stage = Stage(dead={"kvstore-0", "kvstore-1"})
    supervisor = stage.supervisor()
    await supervisor.start(timeout_seconds=30)
    watching = asyncio.create_task(supervisor.watch(interval_seconds=0.01))
    await asyncio.sleep(0.05)
    assert not watching.done()
    watching.cancel()


@pytest.mark.parametrize(
    ("stage", "timeout_seconds", "message"),
    [
        (Stage(fails_to_load="expert-1-0"), 30, "expert-1-0: no such file"),
        (Stage(fails_to_serve="gateway-0"), 30, "gateway-0: port in use"),
        (Stage(never_loads="router-0"), 0.2, r"router-0.* did not start within 0\.2 s"),
    ],
)
async def test_one_failure_ends_everything_and_is_told(
    stage: Stage, timeout_seconds: float, message: str
) -> None:
    with pytest.raises(DeploymentError, match=message):
        await stage.supervisor().start(timeout_seconds)
    assert sorted(stage.killed) == EVERYBODY


async def test_those_who_serve_already_are_told_to_stop_when_another_fails() -> None:
    stage = Stage(fails_to_serve="attention-1")
    with pytest.raises(DeploymentError, match="attention-1: port in use"):
        await stage.supervisor().start(timeout_seconds=5)
    serving = {line.removeprefix("serve ") for line in stage.log if line.startswith("serve ")}
    stopped = {line.removeprefix("stop ") for line in stage.log if line.startswith("stop ")}
    assert "kvstore-0" in serving
    assert stopped == serving


async def test_a_start_can_be_stopped_on_its_way() -> None:
    stage = Stage(never_serves="attention-0")
    supervisor = stage.supervisor()
    starting = asyncio.create_task(supervisor.start(timeout_seconds=5))
    while "serve kvstore-0" not in stage.log:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    async with asyncio.timeout(2):
        await supervisor.stop(grace_seconds=30)
    assert "stop kvstore-0" in stage.log
    assert "stop attention-0" not in stage.log
    assert sorted(stage.killed) == EVERYBODY
    starting.cancel()


async def test_a_snapshot_has_every_member_with_its_counts() -> None:
    supervisor = Stage().supervisor()
    await supervisor.start(timeout_seconds=30)
    snapshot = await supervisor.snapshot()
    assert sorted(member.spec.name for member in snapshot.members) == EVERYBODY
    assert {member.num_requests for member in snapshot.members} == {7}
    assert {member.state for member in snapshot.members} == {MemberState.READY}
    assert snapshot.supervisor == OWN_PROCESS


async def test_the_deployment_goes_on_without_a_replica_and_ends_without_the_group() -> None:
    stage = Stage(dead={"expert-0-1"})
    supervisor = stage.supervisor()
    await supervisor.start(timeout_seconds=30)
    watching = asyncio.create_task(supervisor.watch(interval_seconds=0.01))
    await asyncio.sleep(0.05)
    assert not watching.done()
    states = {m.spec.name: m.state for m in (await supervisor.snapshot()).members}
    assert states["expert-0-1"] is MemberState.DEAD
    stage.dead.add("expert-0-0")
    assert "expert group 0" in await watching


async def test_a_busy_actor_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.supervisor.ANSWER_TIMEOUT_SECONDS", 0.05)
    stage = Stage()
    supervisor = stage.supervisor()
    await supervisor.start(timeout_seconds=30)
    stage.busy.add("attention-0")
    states = {m.spec.name: m.state for m in (await supervisor.snapshot()).members}
    assert states["attention-0"] is MemberState.READY


async def test_callers_stop_before_those_they_call_and_the_dead_are_passed_over() -> None:
    stage = Stage()
    supervisor = stage.supervisor()
    await supervisor.start(timeout_seconds=30)
    stage.log.clear()
    stage.dead.add("router-0")
    await supervisor.stop(grace_seconds=1)
    assert stage.log[0] == "stop gateway-0"
    assert sorted(stage.log[1:3]) == ["stop attention-0", "stop attention-1"]
    assert stage.log[3] == "stop router-1"
    experts = [f"stop {name}" for name in EVERYBODY if "expert" in name]
    assert sorted(stage.log[4:-2]) == experts
    assert sorted(stage.log[-2:]) == ["stop kvstore-0", "stop kvstore-1"]
    assert sorted(stage.killed) == EVERYBODY
