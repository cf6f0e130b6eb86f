"""One template after the other, but rayservice.yaml: what each is for."""

import re
from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    CHART,
    NAME,
    NAMESPACE,
    RAY_PODS,
    RELEASE,
    WORKERS,
    config_of,
    container_of,
    find,
    find_all,
    flags,
    helm,
    render,
    rendered,
    serve_config_of,
    template,
    volumes_of,
)
from tests.helm.kuberay import secrets_of
from tests.helm.options import CASES, OPTIONS

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
    assert volumes_of(manifests, "attention")["tls"]["secret"]["secretName"] == spec["secretName"]
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
