"""Values: what is wrong is refused by name, and they say of the program's settings what it says."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cluster.config import Settings, known_keys, load_settings
from tests.helm.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    VALUES_FILES,
    cluster_of,
    config_of,
    flags,
    helm,
    render,
    template,
)
from tests.helm.options import CASES

# KEY=JSON, and the key as the message writes it.
MISTAKES = (
    # Wrong types.
    ('experts.replicas="two"', "/experts/replicas"),
    ("experts.replicas=1.5", "/experts/replicas"),
    ("image.tag=1", "/image/tag"),
    ('autoscaler.enabled="yes"', "/autoscaler/enabled"),
    ("attention.group.tolerations={}", "/attention/group/tolerations"),
    ("experts.group.nodeSelector.zone=1", "/experts/group/nodeSelector/zone"),
    ('settings.attention.kvBytes="8Gi"', "/settings/attention/kvBytes"),
    ('model.objectStore.args="copy"', "/model/objectStore/args"),
    # Misspelt.
    ("experts.replica=2", "/experts': additional properties 'replica'"),
    ("expert.replicas=2", "additional properties 'expert'"),
    ("attention.group.maximum=2", "/attention/group': additional properties 'maximum'"),
    ("settings.kv.ram_bytes=1073741824", "/settings/kv': additional properties 'ram_bytes'"),
    ("tls.certmanager.enabled=true", "/tls': additional properties 'certmanager'"),
    ("redis.valkey.resource={}", "/redis/valkey': additional properties 'resource'"),
    ("probes.startup={}", "/probes': additional properties 'startup'"),
    # Out of range, on their own or together.
    ("experts.replicas=0", "/experts/replicas"),
    ("attention.group.slots=0", "/attention/group/slots"),
    ("settings.kv.ramBytes=1024", "/settings/kv/ramBytes"),
    ("settings.gateway.silentWorkerSeconds=0", "/settings/gateway/silentWorkerSeconds"),
    ("experts.group.replicas=1", "experts.group.replicas: 1"),
    ("experts.group.min=9", "experts.group.min: 9"),
    ("experts.group.minAvailable=3", "experts.group.minAvailable: 3"),
    ("experts.replicas=9", "experts.replicas: 9"),
    ("attention.workers=5", "attention.workers: 5"),
    ("settings.attention.maxSequences=513", "settings.attention.maxSequences: 513"),
    ("settings.autoscale.experts.minReplicas=9", "settings.autoscale.experts.minReplicas: 9"),
    # None of the words there are.
    ('model.source="s3"', "/model/source"),
    ('settings.model.dtype="float16"', "/settings/model/dtype"),
    ('kv.disk.type="nvme"', "/kv/disk/type"),
    ('upgrade.strategy="InPlace"', "/upgrade/strategy"),
    ('services.grpc.type="ExternalName"', "/services/grpc/type"),
    ('settings.kv.diskFsync="sometimes"', "/settings/kv/diskFsync"),
    # Not what it should look like.
    ('fullnameOverride="Model_1"', "/fullnameOverride"),
    ('redis.url="redis://:secret@cache:6379"', "/redis/url"),
    ('experts.group.resources.limits.memory="4GB"', "/experts/group/resources/limits/memory"),
    ('image.digest="sha256:1"', "/image/digest"),
    # One thing without the other.
    ("tls.enabled=true", "redis.url: with tls.enabled"),
    ('model.source="pvc"', "model.pvc.claimName"),
    ('kv.disk.type="hostPath"', "kv.disk.path"),
)


@pytest.mark.parametrize(("mistake", "key"), MISTAKES, ids=[mistake for mistake, _ in MISTAKES])
def test_a_mistake_is_refused_and_its_key_named(mistake: str, key: str) -> None:
    done = template(mistake)
    assert done.code != 0
    assert key in done.stderr


def test_a_null_takes_nothing_away_that_must_be_there() -> None:
    done = template("experts.replicas=null")
    assert done.code != 0
    assert "missing property 'replicas'" in done.stderr


@pytest.mark.parametrize(("sets", "values"), CASES.values(), ids=CASES.keys())
def test_the_strict_lint_passes(sets: tuple[str, ...], values: tuple[Path, ...]) -> None:
    done = helm("lint", "--strict", CHART, *flags(sets, values))
    assert done.code == 0, done.stdout


def test_the_packaged_chart_renders_what_the_folder_does(tmp_path: Path) -> None:
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.code == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    brought_along = 'auth.secretName="mine"'  # drawn secrets would differ
    for values in ((), *((file,) for file in VALUES_FILES)):
        from_package = helm(
            "template",
            RELEASE,
            package,
            f"--namespace={NAMESPACE}",
            *flags((brought_along,), values),
        )
        assert from_package.code == 0, from_package.stderr
        assert from_package.stdout == template(brought_along, values=values).stdout


# Settings that are no values of their own: what they are follows from others, or is the chart's.
OF_THE_CHART = {
    *("model.path", "topology.attention_workers", "topology.expert_groups"),
    *("topology.expert_replicas", "topology.gateways"),
    *("gateway.host", "gateway.port", "gateway.metrics_host", "gateway.metrics_port"),
    *("gateway.require_client_certificate", "gateway.tokens_file"),
    *("kv.disk_path", "kv.redis", "kv.redis_password", "kv.redis_password_file"),
    *("kv.redis_ca_file", "cluster.ray_address", "cluster.temp_dir"),
}
# Sections of which the chart sets all there is to be set.
SECTIONS_OF_THE_CHART = {"tls", "client"}


def _values_settings() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    return settings


def _camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


def _as_values(section: BaseModel) -> dict[str, Any]:
    return {
        _camel(key): _as_values(value) if isinstance(value, BaseModel) else value
        for key, value in section
    }


def test_every_setting_is_a_value_of_its_name_with_its_default() -> None:
    settings = _values_settings()
    expected = _as_values(Settings())
    for section in SECTIONS_OF_THE_CHART:
        del expected[section]
    for key in OF_THE_CHART:
        section, name = key.split(".")
        del expected[section][_camel(name)]
    assert settings == {section: keys for section, keys in expected.items() if keys}


def test_what_the_chart_sets_itself_are_settings_that_there_are() -> None:
    assert known_keys().keys() >= OF_THE_CHART


@pytest.mark.parametrize(("sets", "values"), CASES.values(), ids=CASES.keys())
def test_the_program_takes_the_rendered_config(
    sets: tuple[str, ...], values: tuple[Path, ...], tmp_path: Path
) -> None:
    file = tmp_path / "model1.yaml"
    file.write_text(yaml.safe_dump(config_of(render(*sets, values=values))))
    settings = load_settings(file, environment={})
    assert settings.gateway.endpoint == "0.0.0.0:50051"
    assert settings.topology.gateways == "per_node"


def test_large_numbers_arrive_as_they_are() -> None:
    assert config_of(render("settings.kv.diskBytes=3840000000000"))["kv"]["disk_bytes"] == (
        3_840_000_000_000
    )


def test_the_version_of_ray_is_that_of_the_package() -> None:
    assert cluster_of(render())["rayVersion"] == importlib.metadata.version("ray")
