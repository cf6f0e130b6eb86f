from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.router.routing import ABOUT_AS_SOON_PAIRS, MIN_PAIRS_AN_EXPERT, Load, RoutingTable

IDLE = Load(0, 0)


def _loads(*addresses: str, **busy: Load) -> dict[str, Load]:
    return {address: IDLE for address in addresses} | busy


def _ids(*expert_ids: int) -> np.ndarray:
    return np.array(expert_ids, dtype=np.int32)


def test_experts_with_the_same_replicas_form_a_group() -> None:
    table = RoutingTable.of(3, [["a"], ["b", "c"], ["a"], ["c", "b"]])
    assert [(group.expert_ids, group.replicas) for group in table.groups] == [
        ((0, 2), ("a",)),
        ((1, 3), ("b", "c")),
    ]
    assert table.replicas == {"a", "b", "c"}
    assert table.num_experts == 4


def test_each_group_takes_its_least_loaded_replica() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["c", "d"]])
    shares = table.split(_ids(0, 1, 0), _loads("b", "c", a=Load(5, 0), d=Load(1, 0))).shares
    assert [(share.replica, share.positions.tolist()) for share in shares] == [
        ("b", [0, 2]),
        ("c", [1]),
    ]


def test_equal_debts_go_to_the_replica_that_has_had_less() -> None:
    table = RoutingTable.of(1, [["a", "b"]])
    loads = {"a": Load(0, 100), "b": Load(0, 90)}
    assert [share.replica for share in table.split(_ids(0), loads).shares] == ["b"]


def test_who_is_through_about_as_soon_takes_them_if_it_has_had_less() -> None:
    table = RoutingTable.of(1, [["a", "b"]])

    def chosen(num_pairs: int, b_owes: int, slowness: float = 1.0) -> str:
        loads = {"a": Load(0, 1000), "b": Load(b_owes, 90, slowness)}
        (share,) = table.split(_ids(*[0] * num_pairs), loads).shares
        return share.replica

    # With one pair more than a would have with twice as many.
    assert [chosen(1, 1), chosen(1, 2), chosen(3, 3), chosen(3, 4)] == ["b", "a", "b", "a"]
    assert chosen(3, 0, slowness=8.0) == "a"


def test_about_as_soon_is_bounded() -> None:
    experts = 4 * ABOUT_AS_SOON_PAIRS  # one pair each: too few to divide
    table = RoutingTable.of(1, [["a", "b"]] * experts)
    for more, expected in ((0, "b"), (1, "a")):
        loads = {"a": Load(0, 1000), "b": Load(ABOUT_AS_SOON_PAIRS + more, 0)}
        (share,) = table.split(_ids(*range(experts)), loads).shares
        assert share.replica == expected


def test_nothing_is_split_into_nothing() -> None:
    assert RoutingTable.of(1, [["a"]]).split(_ids(), _loads("a")) == ([], [], frozenset())


def test_differences_that_are_the_same_in_every_crossing_do_not_add_up() -> None:
    # Expert 0 would always go to b, since a has one pair more of its own.
    table = RoutingTable.of(1, [["a", "b"], ["a"], ["b"]])
    given = Counter[str]()
    for _ in range(100):
        loads = {name: Load(0, given[name]) for name in ("a", "b")}
        shares = table.split(_ids(*[0] * 6, *[1] * 5, *[2] * 4), loads).shares
        given.update({share.replica: len(share.positions) for share in shares})
    assert abs(given["a"] - given["b"]) <= 6


def test_a_slow_replica_takes_what_it_is_through_with_first() -> None:
    table = RoutingTable.of(1, [["slow", "fast"]])

    def chosen(num_pairs: int, fast_owes: int) -> str:
        loads = {"slow": Load(0, 0, slowness=8.0), "fast": Load(fast_owes, 99, slowness=2.0)}
        shares, _, slow = table.split(_ids(*[0] * num_pairs), loads)
        assert slow == {"slow"}
        return shares[0].replica

    assert [chosen(1, owes) for owes in (0, 2, 3, 4)] == ["fast", "fast", "fast", "slow"]
    assert chosen(10, 4) == "fast"


def test_a_replica_is_slow_only_beside_others_of_its_group() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["c", "d"]])
    loads = {
        name: Load(0, 0, slowness) for name, slowness in zip("abcd", (1, 2, 9, 8), strict=True)
    }
    shares, _, slow = table.split(_ids(0, 1), loads)
    assert [share.replica for share in shares] == ["a", "c"]
    assert slow == set()


def test_a_suspect_is_taken_only_where_there_is_no_other() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["a"]])
    loads = {"a": Load(0, 0, is_suspect=True), "b": Load(99, 99, slowness=16.0)}
    shares = table.split(_ids(0, 1), loads).shares
    assert {share.replica: share.positions.tolist() for share in shares} == {"b": [0], "a": [1]}


def test_a_group_that_has_a_choice_goes_where_the_others_of_the_split_do_not() -> None:
    # b has to compute expert 2 anyway, so the copy of expert 0 on a is the one to take.
    table = RoutingTable.of(1, [["a", "b"], ["a"], ["b"]])
    shares = table.split(_ids(0, 0, 1, 2, 2, 2), _loads("a", b=Load(0, 0))).shares
    assert {share.replica: share.positions.tolist() for share in shares} == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
    }


def test_of_groups_with_a_choice_the_largest_comes_first() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["a", "b", "c"], ["b", "a", "c", "d"]])
    loads = {name: Load(owed, 0) for name, owed in (("a", 0), ("b", 0), ("c", 4), ("d", 9))}
    shares = table.split(_ids(0, 1, 1, 1, 2, 2), loads).shares
    assert {share.replica: share.positions.tolist() for share in shares} == {
        "a": [1, 2, 3],  # experts 1
        "b": [0, 4, 5],
    }


def test_pairs_enough_for_two_replicas_are_divided_so_that_both_are_through_at_once() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["a"]])

    def divided(num_pairs: int, **loads: Load) -> dict[str, list[int]]:
        shares = table.split(_ids(*[0] * num_pairs), _loads("a", "b") | loads).shares
        return {share.replica: share.positions.tolist() for share in shares}

    least = MIN_PAIRS_AN_EXPERT
    assert divided(2 * least) == {"a": [*range(least)], "b": [*range(least, 2 * least)]}
    assert divided(2 * least - 1) == {"a": [*range(2 * least - 1)]}
    assert divided(41, a=Load(9, 0)) == {"b": [*range(25)], "a": [*range(25, 41)]}
    assert divided(40, a=Load(100, 0)) == {"b": [*range(40)]}
    slow_and_fast = {"a": Load(0, 0, slowness=6.0), "b": Load(0, 0, slowness=2.0)}
    assert divided(40, **slow_and_fast) == {"b": [*range(30)], "a": [*range(30, 40)]}
    assert divided(40, a=Load(0, 0, is_suspect=True)) == {"b": [*range(40)]}


def test_what_is_divided_evens_out_what_cannot_be() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["a"], ["b"]])
    shares = table.split(_ids(*[0] * 30, *[1] * 4, *[2] * 10), _loads("a", "b")).shares
    assert {share.replica: len(share.positions) for share in shares} == {"a": 22, "b": 22}


def test_a_group_is_divided_only_if_its_experts_have_enough_pairs_each() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["a", "b"]])
    few = [0, 1] * (2 * MIN_PAIRS_AN_EXPERT - 1)
    assert len(table.split(_ids(*few), _loads("a", "b")).shares) == 1
    enough = [0, 1] * (2 * MIN_PAIRS_AN_EXPERT)
    shares = table.split(_ids(*enough), _loads("a", "b")).shares
    assert [len(share.positions) for share in shares] == [2 * MIN_PAIRS_AN_EXPERT] * 2


def test_groups_that_take_the_same_replica_share_a_message() -> None:
    table = RoutingTable.of(1, [["a", "b"], ["a"]])
    shares = table.split(_ids(1, 0), _loads("a", b=Load(9, 9))).shares
    assert [(share.replica, share.positions.tolist()) for share in shares] == [("a", [0, 1])]


def test_a_replica_that_may_not_be_used_is_passed_over() -> None:
    table = RoutingTable.of(1, [["a", "b"]])
    assert [share.replica for share in table.split(_ids(0), {"b": Load(99, 99)}).shares] == ["b"]


def test_pairs_without_a_usable_replica_are_named_by_group_and_the_others_go() -> None:
    table = RoutingTable.of(1, [["a"], ["b"], ["b"], [], ["b"]])
    shares, stranded, _ = table.split(_ids(1, 0, 4, 0, 3), _loads("a"))
    assert [(share.replica, share.positions.tolist()) for share in shares] == [("a", [1, 3])]
    assert [(str(group), positions.tolist()) for group, positions in stranded] == [
        ("group of experts 1-2,4 on b", [0, 2]),
        ("group of experts 3 on -", [4]),
    ]


def test_a_group_without_pairs_needs_no_replica() -> None:
    table = RoutingTable.of(1, [["a"], []])
    assert [share.replica for share in table.split(_ids(0), _loads("a")).shares] == ["a"]


@given(
    replicas_of_expert=st.lists(st.sets(st.sampled_from("abcd")), min_size=1, max_size=12),
    usable=st.sets(st.sampled_from("abcd")),
    data=st.data(),
)
def test_every_pair_goes_to_exactly_one_usable_replica_of_its_expert_or_is_stranded(
    replicas_of_expert: list[set[str]], usable: set[str], data: st.DataObject
) -> None:
    table = RoutingTable.of(1, [sorted(replicas) for replicas in replicas_of_expert])
    expert = st.integers(0, len(replicas_of_expert) - 1)
    draws = st.lists(expert, min_size=1, max_size=40)
    ids = np.array(data.draw(draws), dtype=np.int32).repeat(data.draw(st.integers(1, 30)))
    loads = {name: Load(data.draw(st.integers(0, 90)), 0) for name in sorted(usable)}
    shares, stranded, _ = table.split(ids, loads)
    assert len({share.replica for share in shares}) == len(shares)
    parts = [*(share.positions for share in shares), *(positions for _, positions in stranded)]
    assert sorted(p for positions in parts for p in positions.tolist()) == list(range(len(ids)))
    for share in shares:
        assert (np.diff(share.positions) > 0).all()
        assert share.replica in usable
        assert all(share.replica in replicas_of_expert[ids[p]] for p in share.positions)
    for group, positions in stranded:
        assert usable.isdisjoint(group.replicas)
        assert all(ids[p] in group.expert_ids for p in positions)
