"""What scales a running deployment changes nothing else: no pod template, and so no new cluster."""

import copy
from typing import Any

import pytest

from tests.helm.chart import Manifest, find, render, serve_config_of

# Drawn secrets would be others each time.
SECRET = 'auth.secretName="mine"'


def _without(manifests: list[Manifest], *parts: str) -> list[Manifest]:
    """All of it but the named parts of the RayService."""
    rest = copy.deepcopy(manifests)
    spec = find(rest, "RayService")["spec"]
    for part in parts:
        place: Any = spec
        *path, last = part.split(".")
        for step in path:
            place = place[int(step)] if isinstance(place, list) else place[step]
        place.pop(last)
    return rest


@pytest.mark.parametrize(
    ("value", "key"),
    (("experts.replicas", "expert_replicas"), ("attention.workers", "attention_workers")),
)
def test_replicas_are_in_the_config_of_the_application_alone(value: str, key: str) -> None:
    before, after = render(SECRET), render(SECRET, f"{value}=4")
    assert _without(before, "serveConfigV2") == _without(after, "serveConfigV2")

    old, new = serve_config_of(before), serve_config_of(after)
    (old_application,), (new_application,) = old["applications"], new["applications"]
    # What Serve hands to a running deployment instead of starting another one.
    assert old_application["deployments"][0]["user_config"].pop(key) == 2
    assert new_application["deployments"][0]["user_config"].pop(key) == 4
    assert old == new


@pytest.mark.parametrize(("group", "index"), (("attention", 0), ("experts", 1)))
def test_the_most_nodes_of_a_group_are_in_that_group_alone(group: str, index: int) -> None:
    before, after = render(SECRET), render(SECRET, f"{group}.group.max=16")
    part = f"rayClusterConfig.workerGroupSpecs.{index}.maxReplicas"
    assert before != after
    assert _without(before, part) == _without(after, part)


def test_another_number_of_groups_is_another_cluster() -> None:
    """The experts of every replica are others then, and the running ones cannot change theirs."""
    before, after = render(SECRET), render(SECRET, "experts.groups=4")
    hashes = [
        find(each, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"][
            "metadata"
        ]["annotations"]["model1/config-sha256"]
        for each in (before, after)
    ]
    assert hashes[0] != hashes[1]
