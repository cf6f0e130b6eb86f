"""Experts that move between replicas while the deployment serves."""

from collections.abc import Mapping, Sequence

import pytest

from cluster.config import TopologySettings
from cluster.expert_moves import Move, MoveKind
from cluster.expert_shift import next_wave
from cluster.members import ChangeFailed, ChangeRefused, Rebalance
from cluster.supervisor import Rebalancing, Supervisor
from cluster.topology import plan_topology
from protos.control_pb2 import RoleStats
from protos.router_pb2 import RouterStatsResponse
from tests.cluster.stage import Stage, state_of

# Four experts in two groups: 0 and 1, 2 and 3.
SINGLE = plan_topology(TopologySettings(expert_groups=2), num_experts=4)
DOUBLE = plan_topology(TopologySettings(expert_groups=2, expert_replicas=2), num_experts=4)


def hot(stage: Stage, pairs: Sequence[int]) -> None:
    """So many pairs of each expert, in the second that the router serves."""
    report = RouterStatsResponse(expert_pairs=pairs)
    stage.stats["router-0"] = RoleStats(requests=7, seconds=1.0, router=report)


async def rebalanced(supervisor: Supervisor, *, dry_run: bool = False) -> Rebalance:
    await supervisor.balance.look()
    return await supervisor.changes.rebalance(dry_run=dry_run)


def routes(stage: Stage) -> tuple[tuple[str, ...], ...]:
    told = stage.peers["router-0"].replicas_of_expert
    return tuple(tuple(at.removeprefix("at-expert-") for at in replicas) for replicas in told)


async def test_an_expert_is_loaded_before_routers_hear_of_it_and_dropped_when_none_needs_it() -> (
    None
):
    stage = Stage(SINGLE)
    hot(stage, [300, 300, 100, 100])
    async with stage.started() as supervisor:
        done = await rebalanced(supervisor)
        assert done.balance_before == pytest.approx(400 / 600)
        assert done.balance_after == pytest.approx(1.0)
        assert [(move.kind, move.replica) for move in done.moves].count(
            (MoveKind.LOAD, "expert-1-0")
        ) == 1
        (loaded,) = set(stage.held("expert-1-0")) & {0, 1}
        (given,) = set(stage.held("expert-0-0")) & {2, 3}
        assert routes(stage)[loaded] == ("1-0",)
        assert routes(stage)[given] == ("0-0",)
        log = [entry for entry in stage.log if not entry.startswith("kill")]
        for position, entry in enumerate(log):
            if entry.startswith("hold"):
                _, name, experts = entry.split()
                before = log[:position]
                held = len(experts.split(","))
                earlier = [e for e in before if e.startswith(f"hold {name}")]
                had = len(earlier[-1].split()[2].split(",")) if earlier else 2
                assert abs(held - had) == 1
                if held < had:  # a drop: told and retired since the last load
                    assert before[-1] == "retired router-0"
                else:
                    assert "update router-0" in log[position:]


async def test_a_dry_run_moves_nothing() -> None:
    stage = Stage(SINGLE)
    hot(stage, [300, 300, 100, 100])
    async with stage.started() as supervisor:
        done = await rebalanced(supervisor, dry_run=True)
        assert done.moves
        assert done.epoch == 1
        assert stage.log == []


async def test_without_load_or_with_an_even_one_nothing_moves() -> None:
    stage = Stage(SINGLE)
    async with stage.started() as supervisor:
        assert await rebalanced(supervisor) == Rebalance(1, (), 1.0, 1.0)
        hot(stage, [1000] * 4)
        assert await rebalanced(supervisor) == Rebalance(1, (), 1.0, 1.0)


async def test_the_load_is_that_of_the_time_since_the_last_look_at_all_routers() -> None:
    stage = Stage()

    def counted(router: str, seconds: float, pairs: Sequence[int]) -> None:
        report = RouterStatsResponse(expert_pairs=pairs)
        stage.stats[router] = RoleStats(seconds=seconds, router=report)

    async with stage.started() as supervisor:
        counted("router-0", 100.0, [])
        counted("router-1", 50.0, [500, 0, 0, 50])
        await supervisor.balance.look()
        counted("router-0", 200.0, [0, 100, 0, 0])
        counted("router-1", 150.0, [1000, 0, 0, 50])
        await supervisor.balance.look()  # what came earlier has faded in 100 s
        assert supervisor.balance.load == pytest.approx([5, 1, 0, 0], abs=1e-6)
        counted("router-0", 10.0, [0, 0, 70, 0])  # it was started again
        counted("router-1", 250.0, [1000, 0, 0, 50])
        await supervisor.balance.look()
        assert supervisor.balance.load == pytest.approx([0, 0, 0.7, 0], abs=1e-6)


async def test_a_replica_comes_back_with_what_it_is_to_hold() -> None:
    stage = Stage(SINGLE)
    hot(stage, [300, 300, 100, 100])
    async with stage.started() as supervisor:
        await rebalanced(supervisor)
        held = stage.held("expert-1-0")
        assert set(held) != {2, 3}
        stage.kill("expert-1-0")
        await stage.until("load expert-1-0")
        assert stage.held("expert-1-0") == held


async def test_a_replica_takes_what_it_alone_holds_nowhere() -> None:
    """Of a group of two, one holds more of the other group's experts when it goes."""
    stage = Stage(DOUBLE)
    hot(stage, [900, 100, 100, 100])
    async with stage.started() as supervisor:
        await rebalanced(supervisor)
        for name in ("expert-1-1", "expert-0-0"):
            await supervisor.changes.drain(name)
            spread = routes(stage)
            assert all(spread), spread
            assert not any(name.removeprefix("expert-") in at for at in spread)
        for name in ("expert-1-0", "expert-0-1"):
            member = await state_of(supervisor, name)
            assert stage.held(name) == member.spec.experts


async def test_experts_move_only_while_all_replicas_serve() -> None:
    stage = Stage(SINGLE)
    hot(stage, [300, 300, 100, 100])
    async with stage.started() as supervisor:
        stage.never_loads = "expert-1-0"
        stage.kill("expert-1-0")
        await stage.until("create expert-1-0")
        with pytest.raises(ChangeRefused, match=r"expert-1-0 is (dead|starting)"):
            await rebalanced(supervisor)


async def test_what_cannot_be_loaded_is_told_and_routers_never_hear_of_it() -> None:
    stage = Stage(SINGLE)
    hot(stage, [300, 300, 100, 100])
    stage.cannot_hold = "expert-1-0"
    async with stage.started() as supervisor:
        with pytest.raises(ChangeFailed, match=r"no such file; \d of \d moves were made"):
            await rebalanced(supervisor)
        assert all(routes(stage))
        for name in ("expert-0-0", "expert-1-0"):
            told = {e for e, at in enumerate(routes(stage)) if name.removeprefix("expert-") in at}
            assert told <= set(stage.held(name))


async def test_a_replica_that_dies_while_it_loads_is_never_told_of_as_having_loaded() -> None:
    stage = Stage(SINGLE)
    hot(stage, [300, 300, 100, 100])
    stage.dies_holding = "expert-1-0"
    async with stage.started() as supervisor:
        with pytest.raises(ChangeFailed, match="expert-1-0"):
            await rebalanced(supervisor)
        await stage.until("serve expert-1-0")
        await stage.until_true(lambda: all(routes(stage)))
        assert stage.held("expert-1-0") == (2, 3)
        assert [at for at in routes(stage)[:2] if any("1-0" in each for each in at)] == []


async def test_the_supervisor_rebalances_by_itself_where_that_is_wished_and_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.rebalance_loop.LOOK_SECONDS", 0.01)
    stage = Stage(SINGLE, rebalancing=Rebalancing(every_seconds=0.02))
    hot(stage, [300, 300, 100, 100])
    stage.cannot_hold = "expert-1-0"
    async with stage.started():
        await stage.until_true(lambda: stage.log.count("cannot hold expert-1-0") > 1)
        stage.cannot_hold = ""
        await stage.until_true(lambda: bool({0, 1} & set(stage.held("expert-1-0"))))


def load(replica: str, expert: int) -> Move:
    return Move(MoveKind.LOAD, replica, expert)


def drop(replica: str, expert: int) -> Move:
    return Move(MoveKind.DROP, replica, expert)


@pytest.mark.parametrize(
    ("moves", "nodes", "wave"),
    [
        # One load a node; a replica's moves in their order.
        ([load("a", 1), load("b", 2)], {"a": 0, "b": 0}, [0]),
        ([load("a", 1), load("b", 2)], {"a": 0, "b": 1}, [0, 1]),
        ([load("a", 1), drop("a", 2), drop("b", 3)], {"a": 0, "b": 0}, [0, 2]),
        ([drop("b", 3), load("a", 1), load("b", 2)], {"a": 0, "b": 1}, [0, 1]),
        # A drop waits for every earlier move of its expert.
        ([load("a", 1), drop("b", 1)], {"a": 0, "b": 1}, [0]),
        ([drop("a", 1), drop("b", 1)], {"a": 0, "b": 1}, [0]),
        # What waits holds up what comes after it on its replica.
        ([load("a", 1), load("b", 2), drop("b", 3)], {"a": 0, "b": 0}, [0]),
    ],
)
def test_moves_are_made_side_by_side_where_they_may(
    moves: list[Move], nodes: Mapping[str, int], wave: list[int]
) -> None:
    assert next_wave(moves, nodes.__getitem__) == [moves[index] for index in wave]
