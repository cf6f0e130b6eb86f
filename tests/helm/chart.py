"""The chart as the real helm renders it."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tests.helm.helm_binary import helm_binary

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "model1"
VALUES_FILES = sorted(CHART.glob("values-*.yaml"))
RELEASE, NAMESPACE = "release", "serving"
NAME = f"{RELEASE}-model1"  # of what is there once
RAY_PODS = ("head", "attention", "experts")
WORKERS = ("attention", "experts")

Manifest: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


def helm(*arguments: str | Path) -> Done:
    done = subprocess.run(
        [helm_binary(), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return Done(done.returncode, done.stdout, done.stderr)


def flags(sets: Sequence[str] = (), values: Sequence[Path] = ()) -> list[str]:
    return [*(f"--values={file}" for file in values), *(f"--set-json={each}" for each in sets)]


def template(*sets: str, values: Sequence[Path] = ()) -> Done:
    """`sets` are KEY=JSON."""
    return helm("template", RELEASE, CHART, f"--namespace={NAMESPACE}", *flags(sets, values))


@cache
def rendered(sets: tuple[str, ...], values: tuple[Path, ...]) -> str:
    """The text of it. Raises if helm does."""
    done = template(*sets, values=values)
    assert done.code == 0, done.stderr
    return done.stdout


def render(*sets: str, values: Sequence[Path] = ()) -> list[Manifest]:
    """All objects, in helm's order."""
    text = rendered(sets, tuple(values))
    return [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each is not None]


def find(manifests: Sequence[Manifest], kind: str, name: str = "") -> Manifest:
    """The one object of the kind, or the one whose name ends like this."""
    (found,) = find_all(manifests, kind, name)
    return found


def find_all(manifests: Sequence[Manifest], kind: str, name: str = "") -> list[Manifest]:
    return [
        each
        for each in manifests
        if each["kind"] == kind and each["metadata"]["name"].endswith(name)
    ]


def cluster_of(manifests: Sequence[Manifest]) -> dict[str, Any]:
    config: dict[str, Any] = find(manifests, "RayService")["spec"]["rayClusterConfig"]
    return config


def group_of(manifests: Sequence[Manifest], name: str) -> dict[str, Any]:
    """A worker group, or the head's."""
    config = cluster_of(manifests)
    if name == "head":
        head: dict[str, Any] = config["headGroupSpec"]
        return head
    (group,) = (each for each in config["workerGroupSpecs"] if each["groupName"] == name)
    return dict(group)


def pod_of(manifests: Sequence[Manifest], name: str) -> dict[str, Any]:
    spec: dict[str, Any] = group_of(manifests, name)["template"]["spec"]
    return spec


def container_of(manifests: Sequence[Manifest], name: str) -> dict[str, Any]:
    container: dict[str, Any] = pod_of(manifests, name)["containers"][0]
    return container


def config_of(manifests: Sequence[Manifest]) -> dict[str, dict[str, Any]]:
    """The runtime config that is mounted into the pods."""
    name = find(manifests, "RayService")["metadata"]["name"]
    (config_map,) = (
        each
        for each in manifests
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name
    )
    config: dict[str, dict[str, Any]] = yaml.safe_load(config_map["data"]["model1.yaml"])
    return config


def serve_config_of(manifests: Sequence[Manifest]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(find(manifests, "RayService")["spec"]["serveConfigV2"])
    return config


def mounts_of(manifests: Sequence[Manifest], group: str) -> dict[str, Manifest]:
    """Of the group's Ray container, by path."""
    return {each["mountPath"]: each for each in container_of(manifests, group)["volumeMounts"]}


def volumes_of(manifests: Sequence[Manifest], group: str) -> dict[str, Manifest]:
    """By name."""
    return {each["name"]: each for each in pod_of(manifests, group)["volumes"]}
