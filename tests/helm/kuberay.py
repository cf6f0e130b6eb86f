"""What KubeRay makes of a RayService's groups: the command and the environment of a Ray container.

Rewritten from what its operator does (v1.7: a RayService's pods), so that tests can run what the
chart renders without Kubernetes.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.helm.chart import Manifest, cluster_of, container_of, find, group_of

GCS_PORT = 6379
_BARE_FLAGS = ("true", "false")
_FLAGS_WITH_A_VALUE = ("log-color", "include-dashboard", "include-log-monitor")


@dataclass(frozen=True)
class Start:
    """`command` is for a shell. `environment` has what the manifest and KubeRay set."""

    command: str
    environment: dict[str, str]


def ray_start(
    manifests: Sequence[Manifest],
    group: str,
    *,
    pod_ip: str,
    head_address: str,
    secrets: Mapping[tuple[str, str], str],
    storage_namespace: str = "test",
) -> Start:
    """How a pod of the group starts Ray. `secrets` has the values by (Secret, key); the head's
    address is a host's name or IP."""
    config = cluster_of(manifests)
    is_head = group == "head"
    params = dict(group_of(manifests, group)["rayStartParams"])
    params |= {"block": "true"}
    if not is_head:
        params.setdefault("address", f"{head_address}:{GCS_PORT}")
    params.setdefault("metrics-export-port", "8080")
    params.setdefault("dashboard-agent-listen-port", "52365")
    limits = container_of(manifests, group)["resources"].get("limits", {})
    if "memory" in limits:
        params.setdefault("memory", str(num_bytes(limits["memory"])))

    fixed = {"status.podIP": pod_ip}
    environment: dict[str, str] = {}
    for variable in container_of(manifests, group).get("env", []):
        environment[variable["name"]] = _value_of(variable, fixed, secrets)
    environment["RAY_ADDRESS"] = f"{'127.0.0.1' if is_head else head_address}:{GCS_PORT}"
    environment["RAY_PORT"] = str(GCS_PORT)
    if (auth := config.get("authOptions", {})).get("mode") == "token":
        environment["RAY_AUTH_MODE"] = "token"
        environment["RAY_AUTH_TOKEN"] = secrets[auth["secretName"], "auth_token"]
    if fault_tolerance := config.get("gcsFaultToleranceOptions"):
        if is_head:
            environment["RAY_external_storage_namespace"] = storage_namespace
            environment["RAY_REDIS_ADDRESS"] = fault_tolerance["redisAddress"]
            if password := fault_tolerance.get("redisPassword"):
                environment["REDIS_PASSWORD"] = _value_of(password, fixed, secrets)
                params["redis-password"] = "$REDIS_PASSWORD"
        else:
            environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    # Of a RayService alone.
    environment["RAY_timeout_ms_task_wait_for_death_info"] = "0"
    environment["RAY_gcs_server_request_timeout_seconds"] = "5"
    environment["RAY_SERVE_KV_TIMEOUT_S"] = "5"

    words = ["ray start", *(["--head"] if is_head else [])]
    for key, value in sorted(params.items()):
        if value in _BARE_FLAGS and key not in _FLAGS_WITH_A_VALUE:
            words += [f"--{key}"] if value == "true" else []
        else:
            words.append(f"--{key}={value}")
    return Start(f"ulimit -n 65536; {' '.join(words)}", environment)


def secrets_of(manifests: Sequence[Manifest], name: str = "-auth") -> dict[tuple[str, str], str]:
    """The values of the Secret that the chart draws."""
    secret = find(manifests, "Secret", name)
    return {
        (secret["metadata"]["name"], key): base64.b64decode(value).decode()
        for key, value in secret["data"].items()
    }


def num_bytes(quantity: str) -> int:
    """Kubernetes' 6Gi and the like."""
    for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1):
        if quantity.endswith(unit):
            return int(quantity.removesuffix(unit)) * 1024**power
    return int(quantity)


def _value_of(
    variable: Manifest, fields: Mapping[str, str], secrets: Mapping[tuple[str, str], str]
) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return str(variable["value"])
    if "fieldRef" in source:
        return fields[source["fieldRef"]["fieldPath"]]
    reference = source["secretKeyRef"]
    return secrets[reference["name"], reference["key"]]
