"""The cluster that the chart describes, on hosts instead of pods: the same commands, environments
and files, and what KubeRay does with its serveConfigV2.

Emulated, and so not what is tested: KubeRay itself (tests/helm/kuberay.py has what it adds to a
container, and the PUT of the application is its own), the autoscaler, the image (this
environment's Python), kubelet (a host starts again by its command; a preStop hook runs before it
ends), Services (names in /etc/hosts), the user 10001 and resource limits. Valkey's /data is /tmp.
"""

import base64
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.chaos.questions import Question
from tests.certificates import Authority
from tests.e2e.hosts import Host, Network, mounted_in_etc, network, until
from tests.helm.chart import Manifest, container_of, find, pod_of, render, serve_config_of
from tests.helm.kuberay import ray_start, secrets_of

CLIENT, VALKEY = 250, 251
HEAD, ATTENTION_A, EXPERTS_A, EXPERTS_B, ATTENTION_B = range(1, 6)
GATEWAY_PORT = 50051
START_SECONDS = 240.0
# What an operator brings along: see `tls.secretName`.
CERTIFICATES = "certificates"
SAFE = (
    "tls.enabled=true",
    f'tls.secretName="{CERTIFICATES}"',
    "tls.requireClientCertificate=true",
    "redis.coldTier=false",  # our own Valkey speaks no TLS: the chart refuses KV in the clear
    "auth.tokens.enabled=true",
)
# Shown by what runs on the client's host, unless a test says otherwise.
SHOWN = {
    "MODEL1_CLIENT__CA_FILE": "/etc/client/ca.crt",
    "MODEL1_CLIENT__CERT_FILE": "/etc/client/tls.crt",
    "MODEL1_CLIENT__KEY_FILE": "/etc/client/tls.key",
    "MODEL1_CLIENT__SERVER_NAME": "model1",
    "MODEL1_CLIENT__TOKEN_FILE": "/etc/client/token",
}
TRAFFIC_PROGRAM = str(Path(__file__).with_name("traffic_process.py"))
PUT = """
import json, sys, urllib.request
url, token = sys.argv[1:]
headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
request = urllib.request.Request(url, sys.stdin.buffer.read() or None, headers)
request.method = "PUT" if request.data else "GET"
sys.stdout.write(urllib.request.urlopen(request, timeout=30).read().decode())
"""


@dataclass
class Cluster:
    """Hosts by name; those of one group are called GROUP-a, GROUP-b and so on."""

    network: Network
    stack: ExitStack
    sets: tuple[str, ...]
    authority: Authority
    hosts: dict[str, Host] = field(default_factory=dict)
    changes: tuple[str, ...] = ()  # of values, since then

    def __post_init__(self) -> None:
        data = {
            name: base64.b64encode(text.encode()).decode()
            for name, text in self.certificate("pods").items()
        }
        self._brought = {"kind": "Secret", "metadata": {"name": CERTIFICATES}, "data": data}

    def certificate(self, name: str) -> Mapping[str, str]:
        """A new one, by the names that files of it have in a Secret."""
        issued = self.authority.issue(name)
        assert issued.cert_file and issued.key_file
        files = {"ca.crt": issued.ca_file, "tls.crt": issued.cert_file, "tls.key": issued.key_file}
        return {name: file.read_text() for name, file in files.items()}

    @property
    def manifests(self) -> Sequence[Manifest]:
        """As they were installed: a Secret keeps what was drawn then."""
        return [*render(*self.sets), self._brought]

    @property
    def client(self) -> Host:
        return self.hosts["client"]

    @property
    def gateways(self) -> str:
        """What a headless Service has, for gRPC."""
        hosts = (host for name, host in self.hosts.items() if name.startswith("attention"))
        return "ipv4:" + ",".join(f"{host.address}:{GATEWAY_PORT}" for host in hosts)

    def add(self, name: str, number: int, etc: dict[str, str] | None = None) -> Host:
        host = self.stack.enter_context(self.network.host(name, number, etc or {}))
        self.hosts[name] = host
        return host

    def start(self, name: str) -> Host:
        """The Ray container of the host's group, by its command, also after it has ended."""
        host, group = self.hosts[name], name.partition("-")[0]
        start = ray_start(
            self.manifests,
            group,
            pod_ip=host.address,
            head_address=self.network.address(HEAD),
            secrets=secrets_of(self.manifests),
        )
        host.start(start.command, start.environment)
        return host

    def join(self, name: str, number: int) -> Host:
        """A new host of the group in the name's first part."""
        pod = pod_of(self.manifests, name.partition("-")[0])
        self.add(name, number, mounted_in_etc(self.manifests, pod))
        return self.start(name)

    def start_valkey(self) -> None:
        pod = find(self.manifests, "StatefulSet")["spec"]["template"]["spec"]
        etc = mounted_in_etc(self.manifests, pod)
        etc["valkey/valkey.conf"] = etc["valkey/valkey.conf"].replace("dir /data", "dir /tmp")
        host = self.add("valkey", VALKEY, etc)
        name, (container,) = self.service_name("-valkey"), pod["containers"]
        secrets = secrets_of(self.manifests)
        environment = {
            each["name"]: secrets[(key := each["valueFrom"]["secretKeyRef"])["name"], key["key"]]
            for each in container["env"]
        }
        host.start(f"mkdir -p /run/valkey; {container['command'][2]}", environment)
        self.network.names[name] = [host.address]

    def service_name(self, ending: str) -> str:
        name: str = find(self.manifests, "Service", ending)["metadata"]["name"]
        return name

    def submit(self, *sets: str) -> None:
        """What KubeRay does when serveConfigV2 has changed; `sets` win over those before."""
        self.changes = (*self.changes, *sets)
        rendered = render(*self.sets, *self.changes)
        self._dashboard(json.dumps(serve_config_of(rendered)))

    def application(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._dashboard(""))["applications"]["model1"]
        return found

    def _dashboard(self, body: str) -> str:
        token = secrets_of(self.manifests)[
            find(self.manifests, "Secret", "-auth")["metadata"]["name"], "auth_token"
        ]
        url = f"http://{self.network.address(HEAD)}:8265/api/serve/applications/"
        words = self.client.command("python", "-c", PUT, url, token)
        done = subprocess.run(words, input=body, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def members(self, host: str = "attention-a") -> list[dict[str, Any]]:
        """Asked of the gateway on that host."""
        words = ("model1", "status", "--format", "json", "--endpoint", self.endpoint(host))
        members: list[dict[str, Any]] = json.loads(self.client.run(*words))["topology"]["members"]
        return members

    def endpoint(self, host: str = "attention-a") -> str:
        return f"{self.hosts[host].address}:{GATEWAY_PORT}"

    def ready(self, role: str, host: str = "attention-a") -> list[dict[str, Any]]:
        return [m for m in self.members(host) if (m["role"], m["state"]) == (role, "ready")]

    def drain(self, name: str) -> None:
        """The preStop hook of the host's pod."""
        container = container_of(self.manifests, name.partition("-")[0])
        hook = container["lifecycle"]["preStop"]["exec"]["command"]
        self.hosts[name].run(*hook, timeout_seconds=120)

    @contextmanager
    def traffic(
        self, questions: Sequence[Question], *, streams: int = 4
    ) -> Iterator[dict[str, Any]]:
        """Streams from the client's host meanwhile; afterwards, what came of them."""
        result: dict[str, Any] = {}
        words = ("python", TRAFFIC_PROGRAM, "/etc/questions.json")
        asking = subprocess.Popen(
            self.client.command(*words, str(streams), self.gateways),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert asking.stdin and asking.stdout
        try:
            assert asking.stdout.readline() == "asking\n"
            yield result
            told, _ = asking.communicate("", timeout=120)
            result |= json.loads(told)
        finally:
            asking.kill()
            asking.wait()


@contextmanager
def chart_cluster(folder: Path, questions: Sequence[Question], *sets: str) -> Iterator[Cluster]:
    """Head, attention-a, experts-a, a Valkey, and a client; the application is submitted and
    serves. Every connection of ours has TLS with a certificate at both ends, every client a token.
    """
    with network(folder) as hosts, ExitStack() as stack:
        cluster = Cluster(hosts, stack, (*sets, *SAFE), Authority(folder / "authority"))
        cluster.start_valkey()
        grpc_name = cluster.service_name("-grpc")
        # Every host that may have a gateway: whoever asks takes the first that answers.
        hosts.names[grpc_name] = [hosts.address(number) for number in (ATTENTION_A, ATTENTION_B)]
        rows = [
            {name: getattr(each, name) for name in each.__dataclass_fields__} for each in questions
        ]
        name = find(cluster.manifests, "Secret", "-auth")["metadata"]["name"]
        token = secrets_of(cluster.manifests)[name, "tokens"]
        shown = {**cluster.certificate("client"), "token": token}
        etc = {f"client/{name}": text for name, text in shown.items()}
        client = cluster.add("client", CLIENT, {**etc, "questions.json": json.dumps(rows)})
        environment = {"HOME": "/tmp", "OMP_NUM_THREADS": "1", **SHOWN}
        client.start("exec sleep infinity", environment)
        pod = pod_of(cluster.manifests, "head")
        cluster.add("head", HEAD, mounted_in_etc(cluster.manifests, pod))
        cluster.start("head")
        until("the dashboard answers", lambda: cluster._dashboard(""), START_SECONDS)
        cluster.submit()  # before any worker node is there, as after a helm install
        cluster.join("attention-a", ATTENTION_A)
        cluster.join("experts-a", EXPERTS_A)
        until(
            "the application runs",
            lambda: cluster.application()["status"] == "RUNNING",
            START_SECONDS,
        )
        yield cluster
