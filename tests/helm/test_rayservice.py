"""rayservice.yaml: the pods of each group, and what KubeRay makes of it."""

from typing import Any

import pytest

from tests.helm.chart import (
    NAME,
    RAY_PODS,
    WORKERS,
    cluster_of,
    config_of,
    container_of,
    find,
    group_of,
    mounts_of,
    pod_of,
    render,
    serve_config_of,
    volumes_of,
)
from tests.helm.kuberay import ray_start, secrets_of
from tests.helm.options import OPTIONS


def test_the_head_does_no_work() -> None:
    head = group_of(render(), "head")
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "resources" not in head["rayStartParams"]


def test_each_group_offers_its_slots_and_a_core_for_each() -> None:
    manifests = render("experts.group.slots=3", "attention.group.slots=2")
    params = {name: group_of(manifests, name)["rayStartParams"] for name in WORKERS}
    assert params["experts"]["num-cpus"] == "3"
    assert params["experts"]["resources"] == "'{\"expert_slot\":3}'"
    assert params["attention"]["num-cpus"] == "2"
    assert params["attention"]["resources"] == '\'{"attention_slot":2,"model1_gateway":1}\''


def test_a_group_has_the_nodes_that_its_values_say() -> None:
    manifests = render("experts.group.min=1", "experts.group.replicas=3", "experts.group.max=5")
    group = group_of(manifests, "experts")
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 3, 5)


def test_gpus_are_a_limit_beside_the_others() -> None:
    limits = container_of(render("experts.group.gpus=4"), "experts")["resources"]["limits"]
    assert limits == {"memory": "4Gi", "nvidia.com/gpu": 4}


def test_where_a_group_may_run() -> None:
    manifests = render(*OPTIONS["gpus on chosen nodes"])
    pod = pod_of(manifests, "experts")
    assert pod["nodeSelector"] == {"accelerator": "h100"}
    assert pod["tolerations"][0]["key"] == "gpu"
    assert pod["affinity"] == {"podAffinity": {}}
    assert pod["priorityClassName"] == "serving"
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "experts"
    metadata = group_of(manifests, "attention")["template"]["metadata"]
    assert metadata["labels"]["team"] == "inference"
    assert metadata["annotations"]["example.com/note"] == "x"
    assert pod_of(manifests, "attention")["terminationGracePeriodSeconds"] == 600


@pytest.mark.parametrize("name", RAY_PODS)
def test_a_ray_pod_is_restricted(name: str) -> None:
    pod = pod_of(render(), name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    _assert_restricted(pod["containers"][0])


def test_other_containers_are_restricted_too() -> None:
    manifests = render(*OPTIONS["a model from an object store"])
    _assert_restricted(pod_of(manifests, "experts")["initContainers"][0])
    _assert_restricted(cluster_of(manifests)["autoscalerOptions"])
    valkey = find(manifests, "StatefulSet")["spec"]["template"]["spec"]
    assert valkey["securityContext"]["runAsNonRoot"] is True
    _assert_restricted(valkey["containers"][0])


def _assert_restricted(container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", RAY_PODS)
def test_ray_can_write_where_it_has_to_on_a_read_only_root(name: str) -> None:
    manifests = render()
    mounts, volumes = mounts_of(manifests, name), volumes_of(manifests, name)
    for path in ("/tmp", "/tmp/ray", "/dev/shm"):
        assert "emptyDir" in volumes[mounts[path]["name"]]
        assert not mounts[path].get("readOnly")
    environment = {e["name"]: e.get("value") for e in container_of(manifests, name)["env"]}
    assert environment["HOME"] == "/tmp"


def test_shared_memory_has_room_for_the_ram_tier() -> None:
    manifests = render("settings.kv.ramBytes=1073741824")
    shm = volumes_of(manifests, "attention")["shm"]["emptyDir"]
    assert shm["medium"] == "Memory"
    # The store asks for 64 MiB more than the arena, Ray for its own 80 MiB.
    assert int(shm["sizeLimit"]) >= 1073741824 + 64 * 2**20 + 80 * 2**20


def test_requests_and_limits_are_set_everywhere() -> None:
    manifests = render(*OPTIONS["a model from an object store"])
    containers = [container_of(manifests, name) for name in RAY_PODS]
    containers += pod_of(manifests, "experts")["initContainers"]
    containers += find(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    containers.append(cluster_of(manifests)["autoscalerOptions"])
    for container in containers:
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_an_attention_node_is_ready_while_its_gateway_serves() -> None:
    container = container_of(render(), "attention")
    assert container["readinessProbe"]["grpc"] == {"port": 50051}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    config = config_of(render())["gateway"]
    assert ports == {"grpc": config["port"], "gateway-metrics": config["metrics_port"]}


def test_with_tls_the_command_asks_instead_of_the_kubelet() -> None:
    probe = container_of(render(*OPTIONS["tls from a secret"]), "attention")["readinessProbe"]
    assert "grpc" not in probe
    assert probe["exec"]["command"][:3] == ["model1", "status", "--health"]
    _assert_taken_by_the_command(probe["exec"]["command"])


@pytest.mark.parametrize("name", RAY_PODS)
def test_a_node_is_alive_while_its_raylet_answers(name: str) -> None:
    probe = container_of(render(), name)["livenessProbe"]
    assert probe["httpGet"] == {"path": "/api/healthz", "port": 52365}
    params = group_of(render(), name)["rayStartParams"]
    assert params["dashboard-agent-listen-port"] == "52365"


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_drains_before_it_ends_and_is_given_the_time(name: str) -> None:
    manifests = render("settings.cluster.drainSeconds=45")
    shell = container_of(manifests, name)["lifecycle"]["preStop"]["exec"]["command"]
    assert shell[:2] == ["/bin/bash", "-c"]
    assert f"--endpoint {NAME}-grpc:50051" in shell[2]
    _assert_taken_by_the_command(shell[2].replace('"$POD_IP"', "10.0.0.7").split())
    assert pod_of(manifests, name)["terminationGracePeriodSeconds"] > 45


def _assert_taken_by_the_command(words: list[str]) -> None:
    """The verb has these flags: it is about their values that it could complain."""
    from cluster.main import _parser

    program, *arguments = words
    assert program == "model1"
    _parser().parse_args(arguments)


def test_the_head_has_no_drain_and_needs_none() -> None:
    assert "lifecycle" not in container_of(render(), "head")


def test_the_config_is_mounted_where_the_application_looks() -> None:
    manifests = render()
    (application,) = serve_config_of(manifests)["applications"]
    path = application["args"]["config"]
    for name in RAY_PODS:
        mount = mounts_of(manifests, name)[path]
        assert volumes_of(manifests, name)[mount["name"]]["configMap"]["name"] == NAME
        assert mount["readOnly"] is True


def test_the_replica_of_serve_runs_where_gateways_are_and_takes_no_core() -> None:
    manifests = render()
    (application,) = serve_config_of(manifests)["applications"]
    (deployment,) = application["deployments"]
    asked = deployment["ray_actor_options"]
    assert asked["num_cpus"] == 0
    assert asked["resources"].keys() == {"model1_gateway"}
    assert "model1_gateway" in group_of(manifests, "attention")["rayStartParams"]["resources"]
    assert "model1_gateway" not in group_of(manifests, "experts")["rayStartParams"]["resources"]


def test_ray_asks_for_a_token() -> None:
    manifests = render()
    assert cluster_of(manifests)["authOptions"] == {
        "mode": "token",
        "secretName": f"{NAME}-auth",
    }
    assert "auth_token" in find(manifests, "Secret")["data"]


def test_the_state_of_the_head_is_kept_in_redis() -> None:
    manifests = render()
    options = cluster_of(manifests)["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"redis://{NAME}-valkey:6379"
    reference = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": f"{NAME}-auth", "key": "redis-password"}
    off = cluster_of(render(*OPTIONS["no redis at all"]))
    assert "gcsFaultToleranceOptions" not in off


def test_a_redis_of_one_s_own_is_asked_with_its_password_and_its_authority() -> None:
    manifests = render(*OPTIONS["a redis over tls"])
    assert cluster_of(manifests)["gcsFaultToleranceOptions"] == {
        "redisAddress": "rediss://cache.example:6380",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "cache", "key": "password"}}},
    }
    kv = config_of(manifests)["kv"]
    assert kv["redis"] == "rediss://cache.example:6380"
    mounts, volumes = mounts_of(manifests, "attention"), volumes_of(manifests, "attention")
    for file, secret in ((kv["redis_password_file"], "cache"), (kv["redis_ca_file"], "cache-ca")):
        folder, _, name = file.rpartition("/")
        mounted = volumes[mounts[folder]["name"]]["secret"]
        assert mounted["secretName"] == secret
        assert mounted["items"][0]["path"] == name
    environment = {e["name"]: e.get("value") for e in container_of(manifests, "head")["env"]}
    assert environment["RAY_REDIS_CA_CERT"] == f"{_mount_of(manifests, 'head', 'redis-ca')}/ca.crt"


def _mount_of(manifests: list[Any], group: str, volume: str) -> str:
    (path,) = (p for p, mount in mounts_of(manifests, group).items() if mount["name"] == volume)
    return path


def test_a_redis_without_a_password_is_asked_for_none() -> None:
    manifests = render(*OPTIONS["a redis of one's own"])
    assert "redisPassword" not in cluster_of(manifests)["gcsFaultToleranceOptions"]
    assert "redis_password_file" not in config_of(manifests)["kv"]
    assert "redis-password" not in volumes_of(manifests, "attention")


@pytest.mark.parametrize(
    ("option", "volume"),
    (
        ("a model from a claim", "persistentVolumeClaim"),
        ("a model from an image", "image"),
        ("a model from an object store", "emptyDir"),
        ("a model kept on the nodes", "hostPath"),
    ),
)
def test_the_model_is_mounted_where_the_config_says(option: str, volume: str) -> None:
    manifests = render(*OPTIONS[option])
    for name in WORKERS:
        assert volumes_of(manifests, name)["model"].keys() == {"name", volume}
        assert mounts_of(manifests, name)["/models"]["readOnly"] is True
    assert config_of(manifests)["model"]["path"] in ("/models", "/models/v4")


def test_the_init_container_copies_with_what_is_in_the_secret() -> None:
    (init,) = pod_of(render(*OPTIONS["a model from an object store"]), "experts")["initContainers"]
    assert init["args"] == ["copy", "store:models/v4", "/models"]
    assert init["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert {"name": "model", "mountPath": "/models"} in init["volumeMounts"]


def test_the_shipped_model_needs_no_volume() -> None:
    manifests = render()
    assert "model" not in volumes_of(manifests, "attention")
    assert "path" not in config_of(manifests)["model"]
    assert config_of(render(*OPTIONS["a model in the image"]))["model"]["path"] == "/opt/v4"


@pytest.mark.parametrize(
    ("option", "source"),
    (
        ("kv on nvme", "hostPath"),
        ("kv on claims", "ephemeral"),
        ("kv in an emptyDir, no store elsewhere", "emptyDir"),
    ),
)
def test_the_disk_tier_is_on_attention_nodes_alone(option: str, source: str) -> None:
    manifests = render(*OPTIONS[option])
    path = config_of(manifests)["kv"]["disk_path"]
    assert mounts_of(manifests, "attention")[path]["name"] == "kv-disk"
    assert source in volumes_of(manifests, "attention")["kv-disk"]
    assert "kv-disk" not in volumes_of(manifests, "experts")


def test_certificates_and_tokens_are_mounted_where_the_config_says() -> None:
    manifests = render(*OPTIONS["tokens and tls"])
    config = config_of(manifests)
    for name in WORKERS:
        mounts, volumes = mounts_of(manifests, name), volumes_of(manifests, name)
        assert volumes["tls"]["secret"]["secretName"] == "certs"
        assert volumes["tokens"]["secret"]["secretName"] == "clients"
        for key in ("cert_file", "key_file", "ca_file"):
            assert config["tls"][key].rpartition("/")[0] in mounts
        assert config["gateway"]["tokens_file"].rpartition("/")[0] in mounts


def test_the_autoscaler_is_on_unless_it_is_switched_off() -> None:
    on, off = cluster_of(render()), cluster_of(render(*OPTIONS["no autoscaler, no second cluster"]))
    assert on["enableInTreeAutoscaling"] is True
    assert on["autoscalerOptions"]["version"] == "v2"
    assert off["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in off


def test_no_ray_pod_but_the_autoscaler_s_has_a_token_of_kubernetes() -> None:
    manifests = render()
    assert pod_of(manifests, "head")["automountServiceAccountToken"] is True
    for name in WORKERS:
        assert pod_of(manifests, name)["automountServiceAccountToken"] is False
    off = render("autoscaler.enabled=false")
    assert pod_of(off, "head")["automountServiceAccountToken"] is False


def test_ports_of_ray_are_those_that_the_policies_open() -> None:
    manifests = render()
    for name in RAY_PODS:
        params = group_of(manifests, name)["rayStartParams"]
        policy = find(manifests, "NetworkPolicy", f"-{name}")
        between_nodes = policy["spec"]["ingress"][0]["ports"]
        for param, value in params.items():
            if param.endswith("-port"):
                assert any(
                    port["port"] <= int(value) <= port.get("endPort", port["port"])
                    for port in between_nodes
                ), param


# What KubeRay makes of it.


def test_the_start_command_and_environment_of_a_worker() -> None:
    manifests = render()
    start = ray_start(
        manifests,
        "experts",
        pod_ip="10.0.0.2",
        head_address="10.0.0.1",
        secrets=secrets_of(manifests),
    )
    assert start.command.startswith("ulimit -n 65536; ray start --address=10.0.0.1:6379 --block")
    assert "--resources='{\"expert_slot\":2}'" in start.command
    assert start.environment["RAY_AUTH_MODE"] == "token"
    assert start.environment["POD_IP"] == "10.0.0.2"
    assert (
        start.environment["RAY_AUTH_TOKEN"] == secrets_of(manifests)[f"{NAME}-auth", "auth_token"]
    )


def test_the_start_command_of_the_head_reads_its_password_from_the_environment() -> None:
    manifests = render()
    start = ray_start(
        manifests,
        "head",
        pod_ip="10.0.0.1",
        head_address="10.0.0.1",
        secrets=secrets_of(manifests),
    )
    assert "ray start --head" in start.command
    assert "--redis-password=$REDIS_PASSWORD" in start.command
    assert start.environment["REDIS_PASSWORD"] not in start.command
    assert start.environment["RAY_REDIS_ADDRESS"] == f"redis://{NAME}-valkey:6379"
