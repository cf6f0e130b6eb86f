"""From wanted numbers to a list of actors."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import TopologySettings
from cluster.topology import (
    NoFreeSlot,
    Role,
    Room,
    TopologyError,
    plan_topology,
    split_experts,
    surplus,
    with_replicas,
)


def wanted(workers: int, groups: int, replicas: int) -> TopologySettings:
    return TopologySettings(
        attention_workers=workers, expert_groups=groups, expert_replicas=replicas
    )


def test_the_smallest_deployment_has_one_of_each() -> None:
    topology = plan_topology(wanted(1, 1, 1), num_experts=8)
    names = [actor.name for actor in topology.actors]
    assert names == ["gateway-0", "attention-0", "router-0", "kvstore-0", "expert-0-0"]


def test_without_kv_stores_everything_else_is_the_same() -> None:
    topology = plan_topology(
        wanted(2, 1, 1), num_experts=8, rooms=[Room()] * 2, with_kv_stores=False
    )
    names = [actor.name for actor in topology.actors]
    assert names == [
        *("gateway-0", "attention-0", "attention-1", "router-0", "router-1", "expert-0-0")
    ]
    assert topology.store_of(topology.of_role(Role.ATTENTION)[0]) is None


def test_experts_are_split_into_contiguous_groups_of_nearly_equal_size() -> None:
    assert split_experts(8, 2) == (range(4), range(4, 8))
    assert split_experts(8, 3) == (range(3), range(3, 6), range(6, 8))


@given(st.integers(1, 300), st.integers(1, 300))
def test_every_expert_is_in_exactly_one_group(num_experts: int, num_groups: int) -> None:
    if num_groups > num_experts:
        with pytest.raises(TopologyError, match=f"{num_groups} .* {num_experts} experts"):
            split_experts(num_experts, num_groups)
        return
    groups = split_experts(num_experts, num_groups)
    assert [expert for group in groups for expert in group] == list(range(num_experts))
    lengths = {len(group) for group in groups}
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_each_worker_has_a_router_on_its_node_and_each_group_all_its_replicas(
    workers: int, groups: int, replicas: int, num_nodes: int
) -> None:
    topology = plan_topology(
        wanted(workers, groups, replicas), num_experts=4, rooms=[Room()] * num_nodes
    )
    assert len({actor.name for actor in topology.actors}) == len(topology.actors)
    assert all(0 <= actor.node < num_nodes for actor in topology.actors)
    routers = topology.of_role(Role.ROUTER)
    attention = topology.of_role(Role.ATTENTION)
    assert len(attention) == workers
    assert {router.node for router in routers} == {worker.node for worker in attention}
    assert len(routers) == len({router.node for router in routers})
    assert all(topology.router_of(worker).node == worker.node for worker in attention)
    stores = topology.of_role(Role.KVSTORE)
    assert [store.node for store in stores] == [router.node for router in routers]
    for worker in attention:
        store = topology.store_of(worker)
        assert store is not None
        assert store.node == worker.node
    experts = topology.of_role(Role.EXPERT)
    assert len(experts) == groups * replicas
    for group in range(groups):
        assert sum(expert.group == group for expert in experts) == replicas


def test_experts_go_to_the_nodes_that_have_no_attention_worker_first() -> None:
    topology = plan_topology(wanted(1, 2, 1), num_experts=8, rooms=[Room()] * 3)
    assert [expert.node for expert in topology.of_role(Role.EXPERT)] == [1, 2]


def test_a_deployment_serves_while_every_role_has_someone_left() -> None:
    topology = plan_topology(wanted(2, 2, 2), num_experts=8, rooms=[Room()] * 2)
    everybody = frozenset(actor.name for actor in topology.actors)
    assert topology.missing(everybody) is None
    assert topology.missing(everybody - {"expert-0-0", "expert-1-1", "attention-0"}) is None


@pytest.mark.parametrize(
    ("dead", "message"),
    [
        ({"gateway-0"}, "no gateway"),
        ({"attention-0", "attention-1"}, "no attention worker"),
        ({"attention-0", "router-1"}, "no attention worker with a router"),
        ({"expert-1-0", "expert-1-1"}, "expert group 1"),
    ],
)
def test_a_role_without_anyone_left_is_named(dead: set[str], message: str) -> None:
    topology = plan_topology(wanted(2, 2, 2), num_experts=8, rooms=[Room()] * 2)
    alive = frozenset(actor.name for actor in topology.actors) - dead
    assert message in (topology.missing(alive) or "")


def test_experts_that_moved_are_missed_where_they_are_and_not_where_they_were() -> None:
    topology = plan_topology(wanted(1, 2, 1), num_experts=4)
    first, second = topology.of_role(Role.EXPERT)
    topology = topology.with_changed(replace(first, experts=(0, 2)))
    topology = topology.with_changed(replace(second, experts=(0, 1, 3)))
    everybody = frozenset(actor.name for actor in topology.actors)
    assert topology.missing(everybody) is None
    assert topology.missing(everybody - {first.name}) == "no living replica holds expert 2"
    assert topology.missing(everybody - {second.name}) == "no living replica holds expert 1"


def slots(experts: int, attention: int = 1) -> Room:
    return Room(slots={Role.EXPERT: experts, Role.ATTENTION: attention})


def test_actors_go_where_there_are_slots() -> None:
    rooms = [slots(0, 2), slots(3, 0), slots(1, 0)]
    topology = plan_topology(wanted(2, 2, 2), num_experts=4, rooms=rooms)
    assert [worker.node for worker in topology.of_role(Role.ATTENTION)] == [0, 0]
    nodes = [expert.node for expert in topology.of_role(Role.EXPERT)]
    assert sorted(nodes) == [1, 1, 1, 2]


def test_a_cluster_without_a_free_slot_is_told_which_and_how_many() -> None:
    with pytest.raises(NoFreeSlot, match="no node has a free expert_slot, and 4 more of role exp"):
        plan_topology(wanted(1, 2, 2), num_experts=4, rooms=[slots(3)])
    with pytest.raises(NoFreeSlot, match="attention_slot, and 2 more"):
        plan_topology(wanted(2, 1, 1), num_experts=4, rooms=[slots(3)])


def test_dead_nodes_take_nobody() -> None:
    rooms = [Room(is_alive=False), Room()]
    topology = plan_topology(wanted(2, 2, 2), num_experts=4, rooms=rooms)
    computing = (*topology.of_role(Role.ATTENTION), *topology.of_role(Role.EXPERT))
    assert {actor.node for actor in computing} == {1}


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_growing_keeps_who_is_there_and_ends_with_the_number_wanted(
    groups: int, before: int, after: int, num_nodes: int
) -> None:
    rooms = [Room()] * num_nodes
    old = plan_topology(wanted(1, groups, before), num_experts=8, rooms=rooms)
    new = with_replicas(old, after, range(groups), rooms)
    assert new.actors[: len(old.actors)] == old.actors
    assert len({actor.name for actor in new.actors}) == len(new.actors)
    for group in range(groups):
        assert len(new.replicas_of(group)) == max(before, after)
        on_node = [sum(a.node == n for a in new.replicas_of(group)) for n in range(num_nodes)]
        assert max(on_node) - min(on_node) <= 1


def test_surplus_takes_the_dead_and_then_the_last_to_come() -> None:
    replicas = plan_topology(wanted(1, 1, 4), num_experts=4).replicas_of(0)
    alive = {"expert-0-0", "expert-0-2", "expert-0-3"}
    names = [spec.name for spec in surplus(replicas, 1, alive)]
    assert names == ["expert-0-1", "expert-0-3", "expert-0-2"]
    assert surplus(replicas, 5, alive) == ()


def test_each_node_with_workers_has_a_gateway_of_its_own_where_that_is_wanted() -> None:
    each = wanted(2, 1, 1).model_copy(update={"gateways": "per_node"})
    rooms = [slots(0, 0), slots(0), slots(0), slots(4, 0)]
    topology = plan_topology(each, num_experts=4, rooms=rooms)
    assert [(g.name, g.node) for g in topology.of_role(Role.GATEWAY)] == [
        ("gateway-1", 1),
        ("gateway-2", 2),
    ]
