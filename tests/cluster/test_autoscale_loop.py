"""The loop that scales by itself: from reports to changes, on the stage and with its own clock."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from cluster.autoscale_loop import AutoscaleLoop
from cluster.config import AutoscaleSettings, ExpertScalingLimits, ScalingLimits, TopologySettings
from cluster.members import ChangeRefused
from cluster.supervisor import Supervisor
from cluster.topology import Role, Room, empty_topology
from protos.attention_pb2 import AttentionStatsResponse
from protos.control_pb2 import Autoscaled, RoleStats
from protos.expert_pb2 import ExpertStatsResponse
from protos.router_pb2 import RouterReplicaStats, RouterStatsResponse
from services.histogram import Histogram
from tests.cluster.stage import Stage

INTERVAL = 5.0
SETTINGS = AutoscaleSettings(
    enabled=True,
    interval_seconds=10_000,  # the test looks by itself
    experts=ExpertScalingLimits(min_replicas=1, max_replicas=4, down_after_seconds=60),
    attention=ScalingLimits(min_replicas=1, max_replicas=3, down_after_seconds=60),
)


@dataclass
class Load:
    """Reports of a deployment that is as busy as a test says, since its start."""

    stage: Stage
    loop: AutoscaleLoop
    supervisor: Supervisor
    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)  # seconds, by actor
    answers: dict[str, Histogram] = field(default_factory=dict)  # by replica
    queued: Histogram = field(default_factory=Histogram)

    async def look(
        self,
        *,
        experts: float | dict[str, float] = 0.0,
        attention: float = 0.0,
        answer_seconds: float = 0.001,
        queue_seconds: float = 0.001,
        oldest_seconds: float = 0.0,
    ) -> None:
        """After an interval in which everybody was so busy."""
        self.stage.now += INTERVAL
        self.seconds += INTERVAL
        self.queued.observe(queue_seconds)
        names = [m.spec.name for m in (await self.supervisor.snapshot()).members]
        replicas = [name for name in names if name.startswith("expert-")]
        for name in replicas:
            share = experts if isinstance(experts, float) else experts[name]
            self.answers.setdefault(name, Histogram()).observe(share * INTERVAL + answer_seconds)
            self._report(name, share)
        for name in names:
            if name.startswith("attention-"):
                self._report(name, attention, oldest_seconds)
            elif name.startswith("router-"):
                links = [
                    RouterReplicaStats(
                        address=f"at-{each}", answer_seconds=self.answers[each].to_wire()
                    )
                    for each in replicas
                ]
                router = RouterStatsResponse(replicas=links)
                self.stage.stats[name] = RoleStats(seconds=self.seconds, router=router)
        await self.loop.look()

    def _report(self, name: str, share: float, oldest_seconds: float = 0.0) -> None:
        self.busy[name] = busy = self.busy.get(name, 0.0) + share * INTERVAL
        stats = self.stage.stats[name] = RoleStats(seconds=self.seconds)
        if name.startswith("expert-"):
            calls = self.answers[name].count
            stats.expert.CopyFrom(ExpertStatsResponse(calls=calls, busy_seconds=busy))
        else:
            worker = AttentionStatsResponse(
                filled_seconds=busy,
                queue_seconds=self.queued.to_wire(),
                oldest_waiting_seconds=oldest_seconds,
            )
            stats.attention.CopyFrom(worker)

    def replicas(self, group: int) -> int:
        return len(self.stage.replicas(group))

    def told(self, role: Role, group: int | None = None) -> Autoscaled:
        return next(
            each
            for each in self.loop.told()
            if each.role == role and (group is None or each.expert_group == group)
        )


@asynccontextmanager
async def scaling(settings: AutoscaleSettings = SETTINGS) -> AsyncIterator[Load]:
    """Two workers, two groups of two replicas."""
    stage = Stage(autoscale=settings)
    async with stage.started() as supervisor:
        assert supervisor.autoscaling is not None
        load = Load(stage, supervisor.autoscaling, supervisor)
        await load.look(experts=0.7, attention=0.7)
        yield load


async def test_busy_experts_become_more_group_by_group_and_attention_stays() -> None:
    async with scaling() as load:
        busy = {"expert-0-0": 1.0, "expert-0-1": 0.9, "expert-1-0": 0.7, "expert-1-1": 0.7}
        for _ in range(3):
            assert (load.replicas(0), load.replicas(1)) == (2, 2)
            await load.look(experts=busy, attention=0.7)
        assert (load.replicas(0), load.replicas(1)) == (3, 2)
        assert len(load.stage.workers()) == 2
        told = load.told(Role.EXPERT, 0)
        assert (told.replicas, told.desired_replicas) == (3, 3)
        assert told.last_change.startswith("2 -> 3: 95% busy (aim 70%)")
        assert load.told(Role.EXPERT, 1).last_change == ""


async def test_idle_experts_become_fewer_slowly_and_not_below_the_limit() -> None:
    async with scaling() as load:
        for _ in range(13):
            assert load.replicas(0) == 2
            await load.look(experts=0.05, attention=0.7)
        assert (load.replicas(0), load.replicas(1)) == (1, 1)
        assert load.stage.killed == {"expert-0-1", "expert-1-1"}
        for _ in range(20):
            await load.look(experts=0.0, attention=0.7)
        assert load.replicas(0) == 1


async def test_rows_that_wait_for_replicas_ask_for_more_of_them() -> None:
    async with scaling() as load:
        for seconds in (0.09, 0.1, 0.11):
            await load.look(experts=0.7, attention=0.7, answer_seconds=seconds)
        assert load.replicas(0) == 4
        assert "0.110 s queued (limit 0.02 s)" in load.told(Role.EXPERT, 0).last_change


@pytest.mark.parametrize("which", ["queue_seconds", "oldest_seconds"])
async def test_requests_that_wait_ask_for_more_workers(which: str) -> None:
    async with scaling() as load:
        for seconds in (3.0, 4.0, 5.0):
            await load.look(experts=0.7, attention=0.7, **{which: seconds})
        assert len(load.stage.workers()) == 3
        assert load.told(Role.ATTENTION).last_change.startswith("2 -> 3: 70% busy")


async def test_a_change_that_fails_is_told_and_asked_for_again() -> None:
    async with scaling() as load:
        load.stage.rooms_now = (Room(slots={Role.EXPERT: 2, Role.ATTENTION: 1}),) * 2
        for _ in range(3):
            await load.look(experts=0.95, attention=0.7)
        told = load.told(Role.EXPERT, 0)
        assert (told.replicas, told.desired_replicas) == (2, 3)
        assert "; failed: " in told.last_change
        load.stage.rooms_now = (Room(), Room())
        for _ in range(3):
            await load.look(experts=0.95, attention=0.7)
        assert load.replicas(0) == 3


async def test_a_deployment_outside_the_limits_is_brought_inside() -> None:
    experts = ExpertScalingLimits(min_replicas=3, max_replicas=4)
    settings = SETTINGS.model_copy(update={"experts": experts})
    async with scaling(settings) as load:
        assert (load.replicas(0), load.replicas(1)) == (3, 3)
        assert load.told(Role.EXPERT, 1).last_change == "2 -> 3: the limits are 3 to 4"


async def test_where_nobody_was_asked_for_yet_nobody_is_started() -> None:
    empty = empty_topology(TopologySettings(expert_groups=2), num_experts=4)
    supervisor = Stage(topology=empty, autoscale=SETTINGS).supervisor()
    await supervisor.take_over([])
    assert supervisor.autoscaling is not None
    for _ in range(3):
        await supervisor.autoscaling.look()
    assert (await supervisor.snapshot()).members == ()
    await supervisor.stop()


async def test_nobody_scales_by_hand_beyond_the_limits() -> None:
    async with scaling() as load:
        with pytest.raises(ChangeRefused, match=r"5 would not last: autoscale\.experts .* 1 to 4"):
            await load.supervisor.scale_experts(5, None)
        with pytest.raises(ChangeRefused, match=r"4 would not last: autoscale\.attention .* 3"):
            await load.supervisor.scale_attention(4)
        await load.supervisor.scale_experts(4, 1)
        assert (load.replicas(0), load.replicas(1)) == (2, 4)


async def test_whoever_does_not_answer_says_nothing_about_the_load() -> None:
    async with scaling() as load:
        for _ in range(3):
            load.stage.now += INTERVAL
            await load.loop.look()  # the same reports again
        told = load.told(Role.EXPERT, 0)
        assert not told.HasField("busy_share")
        assert not told.HasField("queue_seconds")
        assert load.replicas(0) == 2


async def test_the_snapshot_tells_of_it_and_without_it_there_is_nothing_to_tell() -> None:
    async with scaling() as load:
        told = (await load.supervisor.snapshot()).autoscaled
        assert [(each.role, each.expert_group) for each in told] == [
            ("attention", 0),
            ("expert", 0),
            ("expert", 1),
        ]
        assert [each.max_replicas for each in told] == [3, 4, 4]
    async with Stage().started() as supervisor:
        assert (await supervisor.snapshot()).autoscaled == ()
