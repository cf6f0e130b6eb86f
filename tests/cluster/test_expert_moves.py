"""The way from one placement to the next: experts are served on every step of it."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.expert_moves import MoveKind, moves_of
from cluster.expert_placement import BalanceSettings, PlacementPlan, Replica, plan_placement
from cluster.plan.expert_mover import ExpertMover
from tests.cluster.expert_placements import Case, cases, missing, replicas_of


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[float], PlacementPlan]:
    """From any placement to any other on the same replicas, not only to one that is better."""
    case = draw(cases())
    num_experts = len(case.load)
    held: list[set[int]] = [set() for _ in case.replicas]
    for expert in draw(st.permutations(range(num_experts))):
        room = [i for i, each in enumerate(case.replicas) if len(held[i]) < each.slots]
        held[draw(st.sampled_from(room))].add(expert)
    for experts, replica in zip(held, case.replicas, strict=True):
        room_left = replica.slots - len(experts)
        experts |= set(draw(st.lists(st.integers(0, num_experts - 1), max_size=room_left)))
    after = tuple(
        Replica(replica.name, replica.slots, frozenset(experts))
        for replica, experts in zip(case.replicas, held, strict=True)
    )
    return case.load, PlacementPlan(case.replicas, after, 0.0, 0.0)


@given(plans())
def test_moves_lead_from_the_old_placement_to_the_new_one_without_a_gap(
    wanted: tuple[list[float], PlacementPlan],
) -> None:
    load, plan = wanted
    held = {replica.name: set(replica.experts) for replica in plan.before}
    slots = {replica.name: replica.slots for replica in plan.before}
    served = set().union(*held.values())
    moves = moves_of(plan, load)
    for move in moves:
        if move.kind is MoveKind.LOAD:
            assert move.expert not in held[move.replica]
            held[move.replica].add(move.expert)
        else:
            held[move.replica].remove(move.expert)
        assert served <= set().union(*held.values())
        assert len(held[move.replica]) <= slots[move.replica] + 1
    assert held == {replica.name: set(replica.experts) for replica in plan.after}
    assert len(moves) == len({(move.replica, move.expert) for move in moves})  # nothing to and fro


@given(plans(), st.integers(1, 4))
def test_nor_is_there_a_gap_when_moves_are_made_side_by_side(
    wanted: tuple[list[float], PlacementPlan], loads_at_once: int
) -> None:
    load, plan = wanted
    mover = ExpertMover(plan.before, load_seconds=1.0, loads_at_once=loads_at_once)
    served = set(range(len(load))) - missing(Case(load, plan.before))
    mover.start(moves_of(plan, load), 0.0)
    for second in range(plan.num_loads + 1):
        mover.advance(float(second))
        assert not missing(Case(load, mover.replicas())) & served
        assert all(len(each.experts) <= each.slots + 1 for each in mover.replicas())
    assert mover.is_idle
    assert mover.replicas() == plan.after
    assert mover.num_loads == plan.num_loads


def test_a_full_replica_can_exchange_its_only_copy_for_that_of_another() -> None:
    before, after = replicas_of([[0], [1]], slots=1), replicas_of([[1], [0]], slots=1)
    moves = moves_of(PlacementPlan(before, after, 0.0, 0.0), [1, 1])
    assert [move.kind for move in moves] == ["load", "load", "drop", "drop"]


def test_what_nobody_holds_is_loaded_before_anything_is_evened_out() -> None:
    load = [30, 1, 1, 10]
    plan = plan_placement(load, replicas_of([[0, 1], [2]], slots=3), BalanceSettings())
    assert moves_of(plan, load)[0].expert == 3
