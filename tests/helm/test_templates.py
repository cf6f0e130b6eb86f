"""One template after the other: what each is for."""

import re
from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    cluster_of,
    config_of,
    container_of,
    find,
    find_all,
    flags,
    group_of,
    helm,
    pod_of,
    render,
    rendered,
    serve_config_of,
    template,
)
from tests.helm.kuberay import ray_start, secrets_of
from tests.helm.options import CASES, OPTIONS

RAY_PODS = ("head", "attention", "experts")
WORKERS = ("attention", "experts")
NAME = f"{RELEASE}-model1"


def _mounts(manifests: list[Any], group: str) -> dict[str, dict[str, Any]]:
    return {each["mountPath"]: each for each in container_of(manifests, group)["volumeMounts"]}


def _volumes(manifests: list[Any], group: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in pod_of(manifests, group)["volumes"]}


# Of all templates.


def test_each_template_is_one_object() -> None:
    several = {"dashboards.yaml"}  # one a role
    for file in CHART.glob("templates/*.yaml"):
        kinds = re.findall(r"^kind:", file.read_text(), flags=re.MULTILINE)
        assert len(kinds) == (0 if file.name == "checks.yaml" else 1), file.name
        if file.name not in several:
            assert "\n---" not in file.read_text(), file.name


def test_every_template_is_rendered_by_some_case() -> None:
    seen = set[str]()
    for sets, values in CASES.values():
        output = rendered(sets, values)
        seen |= set(re.findall(r"^# Source: model1/templates/(.*)", output, flags=re.MULTILINE))
    files = {file.name for file in CHART.glob("templates/*.yaml")}
    assert seen == files - {"checks.yaml"}


@pytest.mark.parametrize("sets", OPTIONS.values(), ids=OPTIONS.keys())
def test_objects_have_the_labels_of_the_release_and_fitting_names(sets: tuple[str, ...]) -> None:
    for manifest in render(*sets):
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "model1"
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert len(manifest["metadata"]["name"]) <= 63


def test_a_long_release_leaves_room_for_the_names_that_kuberay_makes() -> None:
    done = helm("template", "r" * 53, CHART)
    assert done.code == 0, done.stderr
    manifests = [each for each in yaml.safe_load_all(done.stdout) if each]
    assert len(find(manifests, "RayService")["metadata"]["name"]) <= 47


def test_no_selector_finds_what_another_is_for() -> None:
    """Pods of one component are one role's; selectors name it, or Ray's head."""
    manifests = render()
    for kind in ("Service", "PodDisruptionBudget"):
        for manifest in find_all(manifests, kind):
            selector = manifest["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert selector["app.kubernetes.io/instance"] == RELEASE
            assert "app.kubernetes.io/component" in selector or "ray.io/node-type" in selector


# rayservice.yaml


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
    mounts, volumes = _mounts(manifests, name), _volumes(manifests, name)
    for path in ("/tmp", "/tmp/ray", "/dev/shm"):
        assert "emptyDir" in volumes[mounts[path]["name"]]
        assert not mounts[path].get("readOnly")
    environment = {e["name"]: e.get("value") for e in container_of(manifests, name)["env"]}
    assert environment["HOME"] == "/tmp"


def test_shared_memory_has_room_for_the_ram_tier() -> None:
    manifests = render("settings.kv.ramBytes=1073741824")
    shm = _volumes(manifests, "attention")["shm"]["emptyDir"]
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
        mount = _mounts(manifests, name)[path]
        assert _volumes(manifests, name)[mount["name"]]["configMap"]["name"] == NAME
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
    mounts, volumes = _mounts(manifests, "attention"), _volumes(manifests, "attention")
    for file, secret in ((kv["redis_password_file"], "cache"), (kv["redis_ca_file"], "cache-ca")):
        folder, _, name = file.rpartition("/")
        mounted = volumes[mounts[folder]["name"]]["secret"]
        assert mounted["secretName"] == secret
        assert mounted["items"][0]["path"] == name
    environment = {e["name"]: e.get("value") for e in container_of(manifests, "head")["env"]}
    assert environment["RAY_REDIS_CA_CERT"] == f"{_mount_of(manifests, 'head', 'redis-ca')}/ca.crt"


def _mount_of(manifests: list[Any], group: str, volume: str) -> str:
    (path,) = (p for p, mount in _mounts(manifests, group).items() if mount["name"] == volume)
    return path


def test_a_redis_without_a_password_is_asked_for_none() -> None:
    manifests = render(*OPTIONS["a redis of one's own"])
    assert "redisPassword" not in cluster_of(manifests)["gcsFaultToleranceOptions"]
    assert "redis_password_file" not in config_of(manifests)["kv"]
    assert "redis-password" not in _volumes(manifests, "attention")


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
        assert _volumes(manifests, name)["model"].keys() == {"name", volume}
        assert _mounts(manifests, name)["/models"]["readOnly"] is True
    assert config_of(manifests)["model"]["path"] in ("/models", "/models/v4")


def test_the_init_container_copies_with_what_is_in_the_secret() -> None:
    (init,) = pod_of(render(*OPTIONS["a model from an object store"]), "experts")["initContainers"]
    assert init["args"] == ["copy", "store:models/v4", "/models"]
    assert init["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert {"name": "model", "mountPath": "/models"} in init["volumeMounts"]


def test_the_shipped_model_needs_no_volume() -> None:
    manifests = render()
    assert "model" not in _volumes(manifests, "attention")
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
    assert _mounts(manifests, "attention")[path]["name"] == "kv-disk"
    assert source in _volumes(manifests, "attention")["kv-disk"]
    assert "kv-disk" not in _volumes(manifests, "experts")


def test_certificates_and_tokens_are_mounted_where_the_config_says() -> None:
    manifests = render(*OPTIONS["tokens and tls"])
    config = config_of(manifests)
    for name in WORKERS:
        mounts, volumes = _mounts(manifests, name), _volumes(manifests, name)
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


# configmap.yaml, secret.yaml, serviceaccount*.yaml


def test_replicas_are_not_in_the_config_file() -> None:
    topology = config_of(render())["topology"]
    assert topology == {"expert_groups": 2, "gateways": "per_node"}


def test_the_secret_has_what_is_needed_and_not_brought_along() -> None:
    def keys(*sets: str) -> set[str]:
        return set(find(render(*sets), "Secret")["data"])

    assert keys() == {"auth_token", "redis-password"}
    assert keys("auth.tokens.enabled=true") == {"auth_token", "redis-password", "tokens"}
    assert keys(*OPTIONS["a redis of one's own"]) == {"auth_token"}
    assert find_all(render(*OPTIONS["every secret brought along"]), "Secret") == []


def test_secrets_are_drawn_and_long() -> None:
    first, second = (template().stdout for _ in range(2))
    assert first != second
    drawn = secrets_of(render())
    assert all(len(value) >= 32 for value in drawn.values())
    assert len(set(drawn.values())) == len(drawn)


def test_nothing_that_is_secret_is_in_the_config() -> None:
    manifests = render("auth.tokens.enabled=true")
    texts = [str(each) for each in manifests if each["kind"] != "Secret"]
    for value in secrets_of(manifests).values():
        assert not any(value in text for text in texts)


def test_service_accounts_mount_a_token_for_the_autoscaler_alone() -> None:
    manifests = render(*OPTIONS["open to the world"])
    accounts = {
        each["metadata"]["name"]: each["automountServiceAccountToken"]
        for each in find_all(manifests, "ServiceAccount")
    }
    assert accounts == {"inference": False, "inference-head": True}
    assert find(manifests, "ServiceAccount", "inference")["metadata"]["annotations"] == {
        "example.com/identity": "model1"
    }


# service-*.yaml


def test_grpc_is_in_front_of_the_gateways_once_with_and_once_without_an_address() -> None:
    manifests = render()
    service, headless = (
        find(manifests, "Service", name)["spec"] for name in ("-grpc", "-grpc-headless")
    )
    assert service["type"] == "ClusterIP"
    assert headless["clusterIP"] == "None"
    for spec in (service, headless):
        assert spec["selector"]["app.kubernetes.io/component"] == "attention"
        (port,) = spec["ports"]
        assert (port["port"], port["targetPort"]) == (50051, "grpc")


def test_services_can_be_opened_to_the_outside() -> None:
    manifests = render(*OPTIONS["open to the world"])
    grpc = find(manifests, "Service", "-grpc")
    assert grpc["spec"]["type"] == "LoadBalancer"
    assert grpc["metadata"]["annotations"] == {"example.com/internal": "true"}
    assert find(manifests, "Service", "-http")["spec"]["type"] == "NodePort"


def test_http_is_behind_the_proxy_on_the_head_and_never_behind_kuberay_s_cleanup_job() -> None:
    spec = find(render(), "Service", "-http")["spec"]
    assert spec["selector"]["ray.io/node-type"] == "head"
    assert spec["ports"][0]["targetPort"] == "serve"
    ports = {p["name"]: p["containerPort"] for p in container_of(render(), "head")["ports"]}
    assert ports["serve"] == serve_config_of(render())["http_options"]["port"] == 8000


def test_metrics_can_be_read_also_of_a_gateway_that_is_not_ready() -> None:
    manifests = render(*OPTIONS["monitoring"])
    service = find(manifests, "Service", "-metrics")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["ports"][0]["targetPort"] == "gateway-metrics"
    monitor = find(manifests, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == [NAMESPACE]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert find_all(render(), "ServiceMonitor") == []


# pdb-*.yaml, networkpolicy-*.yaml


@pytest.mark.parametrize("name", WORKERS)
def test_a_number_of_nodes_stays_while_others_are_drained(name: str) -> None:
    budget = find(render(), "PodDisruptionBudget", f"-{name}")
    assert type(budget["spec"]["minAvailable"]) is int
    assert budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] == name
    assert find_all(render(f"{name}.group.minAvailable=0"), "PodDisruptionBudget", name) == []


def _peers(policy: dict[str, Any], port: int) -> set[str]:
    """The components that may connect to the port; `else` is whoever is no pod of the release."""
    peers = set[str]()
    for rule in policy["spec"]["ingress"]:
        if not any(p["port"] <= port <= p.get("endPort", p["port"]) for p in rule["ports"]):
            continue
        for peer in rule["from"]:
            selector = peer.get("podSelector", {})
            labels = selector.get("matchLabels", {})
            if labels.get("app.kubernetes.io/instance") != RELEASE:
                peers.add("else")
            elif "app.kubernetes.io/component" in labels:
                peers.add(labels["app.kubernetes.io/component"])
            else:
                (expression,) = selector["matchExpressions"]
                peers |= set(expression["values"])
    return peers


@pytest.mark.parametrize(
    ("to", "port", "who"),
    (
        # Roles listen where the kernel gives them a port: routers send rows to experts, gateways
        # and stores ask those of other nodes. Nobody else does.
        ("experts", 40000, {"attention"}),
        ("attention", 40000, {"attention"}),
        ("attention", 50051, {"attention", "experts", "else"}),
        ("attention", 9464, {"else"}),
        ("head", 6379, {"head", "attention", "experts"}),
        ("head", 8000, {"else"}),
        ("head", 40000, set()),
        ("valkey", 6379, {"head", "attention"}),
        ("valkey", 22, set()),
        ("experts", 20500, {"head", "attention", "experts"}),
    ),
)
def test_only_those_may_talk_who_do(to: str, port: int, who: set[str]) -> None:
    assert _peers(find(render(), "NetworkPolicy", f"-{to}"), port) == who


def test_every_pod_has_a_policy_unless_they_are_off() -> None:
    names = {each["metadata"]["name"] for each in find_all(render(), "NetworkPolicy")}
    assert names == {f"{NAME}-{each}" for each in (*RAY_PODS, "valkey")}
    assert find_all(render("networkPolicy.enabled=false"), "NetworkPolicy") == []


def test_without_clients_nobody_else_reaches_the_gateways() -> None:
    policy = find(render("networkPolicy.clients=[]"), "NetworkPolicy", "-attention")
    assert _peers(policy, 50051) == {"attention", "experts"}


# valkey-*.yaml


@pytest.mark.parametrize("option", ("a redis of one's own", "no redis at all"))
def test_there_is_no_valkey_where_none_is_needed(option: str) -> None:
    names = [each["metadata"]["name"] for each in render(*OPTIONS[option])]
    assert [name for name in names if "valkey" in name] == []


def test_valkey_evicts_nothing_and_has_room_for_blobs_and_ray() -> None:
    manifests = render("settings.kv.redisBytes=1073741824")
    text = find(manifests, "ConfigMap", "-valkey")["data"]["valkey.conf"]
    lines = [line.partition(" ") for line in text.splitlines() if not line.startswith("#")]
    settings = {name: value for name, _, value in lines}
    assert settings["maxmemory-policy"] == "noeviction"
    assert int(settings["maxmemory"]) > 1073741824
    assert settings["appendonly"] == "yes"


def test_valkey_keeps_its_data_on_a_claim_unless_it_is_not_to() -> None:
    spec = find(render(), "StatefulSet")["spec"]
    assert spec["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
    spec = find(render("redis.valkey.persistence.enabled=false"), "StatefulSet")["spec"]
    assert "volumeClaimTemplates" not in spec
    assert {"name": "data", "emptyDir": {}} in spec["template"]["spec"]["volumes"]


# certificate.yaml


def test_the_certificate_has_the_name_that_roles_expect_and_those_of_the_services() -> None:
    manifests = render(*OPTIONS["tls from cert-manager, clients too"])
    spec = find(manifests, "Certificate")["spec"]
    assert set(spec["usages"]) == {"server auth", "client auth"}
    assert spec["issuerRef"] == {"name": "ca", "kind": "ClusterIssuer"}
    for name in ("model1", "localhost", f"{NAME}-grpc.{NAMESPACE}.svc", "model1.example"):
        assert name in spec["dnsNames"]
    assert config_of(manifests)["tls"]["server_name"] in spec["dnsNames"]
    assert _volumes(manifests, "attention")["tls"]["secret"]["secretName"] == spec["secretName"]
    assert config_of(manifests)["gateway"]["require_client_certificate"] is True


# NOTES.txt


def _notes(*sets: str) -> str:
    done = helm(
        "install", RELEASE, CHART, f"--namespace={NAMESPACE}", "--dry-run=client", *flags(sets)
    )
    assert done.code == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def test_the_notes_say_the_next_commands() -> None:
    notes = _notes()
    assert f"kubectl -n {NAMESPACE} wait rayservice/{NAME}" in notes
    assert "grpcurl -plaintext" in notes
    assert "--set experts.replicas=3" in notes
    assert "in the clear" in notes


def test_the_notes_show_certificates_and_a_token_where_they_are_needed() -> None:
    notes = _notes(*OPTIONS["tokens and tls"])
    assert "grpcurl -cacert" in notes
    assert "get secret clients" in notes
    assert "in the clear" not in notes


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
