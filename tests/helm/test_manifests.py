"""Whatever the chart renders is valid under the schemas of Kubernetes and KubeRay, and these find
what is wrong."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helm.chart import find, render
from tests.helm.options import CASES
from tests.helm.schemas import WITHOUT_SCHEMA, Invalid, validate


@pytest.mark.parametrize(("sets", "values"), CASES.values(), ids=CASES.keys())
def test_every_object_is_valid(sets: tuple[str, ...], values: tuple[Path, ...]) -> None:
    manifests = render(*sets, values=values)
    # Last, as the test skips where their schema is not there.
    for manifest in sorted(manifests, key=lambda each: each["kind"] == "RayService"):
        validate(manifest)


def test_only_kinds_of_other_operators_have_no_schema() -> None:
    seen = {
        (manifest["apiVersion"], manifest["kind"])
        for sets, values in CASES.values()
        for manifest in render(*sets, values=values)
    }
    native = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "ray.io/v1"}
    assert {kind for version, kind in seen if version not in native} == WITHOUT_SCHEMA


class Planted(NamedTuple):
    name: str
    kind: str
    suffix: str  # of the object's name
    path: str
    value: Any  # REMOVED, or what is put there
    complaint: str  # in the message


REMOVED = object()
CLUSTER = "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec"
GROUPS = f"{CLUSTER}.workerGroupSpecs"
WORKER = f"{GROUPS}.0.template.spec.containers.0"

PLANTED = (
    # Found by KubeRay's.
    Planted("groups at the top", "RayService", "", "spec.workerGroupSpecs", [], "workerGroupSpecs"),
    Planted("a nameless group", "RayService", "", f"{GROUPS}.0.groupName", REMOVED, "groupName"),
    Planted("replicas as text", "RayService", "", f"{GROUPS}.1.replicas", "two", "replicas"),
    Planted("no head", "RayService", "", HEAD, REMOVED, "headGroupSpec"),
    Planted("num-cpus: 0", "RayService", "", f"{HEAD}.rayStartParams.num-cpus", 0, "num-cpus"),
    Planted("another mode", "RayService", "", f"{CLUSTER}.authOptions.mode", "basic", "mode"),
    Planted("v3", "RayService", "", f"{CLUSTER}.autoscalerOptions.version", "v3", "version"),
    Planted(
        "a misspelt address",
        "RayService",
        "",
        f"{CLUSTER}.gcsFaultToleranceOptions.redisAdress",
        "redis:6379",
        "redisAdress",
    ),
    Planted("no port", "RayService", "", f"{WORKER}.readinessProbe", {"grpc": {}}, "port"),
    Planted(
        "no path", "RayService", "", f"{WORKER}.volumeMounts.0.mountPath", REMOVED, "mountPath"
    ),
    Planted(
        "capabilities as text",
        "RayService",
        "",
        f"{WORKER}.securityContext.capabilities",
        "none",
        "capabilities",
    ),
    Planted(
        "a misspelt restriction",
        "RayService",
        "",
        f"{WORKER}.securityContext.readOnlyRootFileSystem",
        True,
        "readOnlyRootFileSystem",
    ),
    Planted(
        "serve's config as a tree", "RayService", "", "spec.serveConfigV2", {}, "serveConfigV2"
    ),
    Planted("no name", "RayService", "", "metadata.name", REMOVED, "name"),
    # Found by Kubernetes'.
    Planted("no number", "Service", "-grpc", "spec.ports.0.port", REMOVED, "port"),
    Planted("another selector", "Service", "-http", "spec.selectors", {}, "selectors"),
    Planted("no selector", "StatefulSet", "-valkey", "spec.selector", REMOVED, "selector"),
    Planted("one as text", "StatefulSet", "-valkey", "spec.replicas", "1", "replicas"),
    Planted("no pods", "NetworkPolicy", "-head", "spec.podSelector", REMOVED, "podSelector"),
    Planted(
        "a port as a list", "NetworkPolicy", "-head", "spec.ingress.0.ports.0.port", [1], "port"
    ),
    Planted("a list", "PodDisruptionBudget", "-experts", "spec.minAvailable", [1], "minAvailable"),
    Planted("no text", "ConfigMap", "-valkey", "data.port", 6379, "port"),
    Planted(
        "a word", "ServiceAccount", "-head", "automountServiceAccountToken", "yes", "automount"
    ),
    Planted("no such kind", "ServiceAccount", "-head", "kind", "ServiceAcount", "ServiceAcount"),
)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_error_is_found_and_named(planted: Planted) -> None:
    manifest = copy.deepcopy(find(render(), planted.kind, planted.suffix))
    validate(manifest)
    *path, last = planted.path.split(".")
    place: Any = manifest
    for step in path:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if planted.value is REMOVED:
        del place[last]
    else:
        place[last] = planted.value
    with pytest.raises(Invalid, match=planted.complaint):
        validate(manifest)
