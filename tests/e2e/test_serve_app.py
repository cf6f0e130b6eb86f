"""The application under Ray Serve, on raylets of this machine: what it starts, what it leaves, and
what ends with it."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from cluster.detached import NAMESPACE
from cluster.serve_app import build
from tests.e2e.command import run, run_json, wait_until_gone
from tests.services import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROMPT = tiny_model.prompt(12)
MEMORY_BYTES = 2**27
PORT = 18765
ATTENTION = {"attention_slot": 1, "model1_gateway": 1}


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without room for anybody. Who has some comes later, as pods do."""
    arguments = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": MEMORY_BYTES,
    }
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        ray.init(cluster.address, log_to_driver=False, namespace="serve")
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def application(folder: Path, checkpoint: Path, workers: int, replicas: int) -> serve.Application:
    config = {
        "model": {"path": str(checkpoint)},
        "topology": {"gateways": "per_node"},
        "gateway": {"host": "0.0.0.0", "port": 0},
        "kv": {"redis": "off", "ram_bytes": 2**24},
        "cluster": {"ray_address": "auto", "drain_seconds": 5},
    }
    file = folder / "model1.yaml"
    file.write_text(yaml.safe_dump(config))
    app = build({"config": str(file)})
    sizes = {"attention_workers": workers, "expert_replicas": replicas}
    options = {"num_cpus": 0, "resources": {"model1_gateway": 0.001}}
    deployment = app._bound_deployment.options(user_config=sizes, ray_actor_options=options)
    bound: serve.Application = deployment.bind(str(file))
    return bound


def submit(app: serve.Application) -> None:
    target = serve.RunTarget(target=app, name="model1", route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def post(**fields: Any) -> Any:

    body = {"prompt": list(PROMPT), "temperature": 0, "return_token_ids": True, **fields}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def members() -> dict[str, dict[str, Any]]:
    """By name, asked of any gateway."""
    supervisor = ray.get_actor("supervisor", namespace=NAMESPACE)
    snapshot: Any = ray.get(supervisor.snapshot.remote(), timeout=30)
    gateways = [m for m in snapshot.members if m.spec.role == "gateway" and m.state == "ready"]
    status = run_json("status", "--endpoint", gateways[0].address)
    return {member["name"]: member for member in status["topology"]["members"]}


def ready() -> list[str]:
    return [name for name, member in members().items() if member["state"] == "ready"]


def until(is_so: Callable[[], bool], timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            if is_so():
                return
        except (RayError, AssertionError, IndexError):  # whom to ask is away, or not there yet
            pass
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_the_application_from_its_first_node_to_its_end(
    nodes: Cluster, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    submit(application(tmp_path, tiny_checkpoint, 1, 1))
    nodes.add_node(num_cpus=1, resources=ATTENTION, object_store_memory=MEMORY_BYTES)
    nodes.add_node(num_cpus=4, resources={"expert_slot": 4}, object_store_memory=MEMORY_BYTES)
    until(lambda: serve.status().applications["model1"].status == "RUNNING", 200)
    answer = post(max_tokens=8)["choices"][0]["token_ids"]
    assert answer == tiny_model.model().generate(PROMPT, 8)
    first = members()
    assert {"gateway-0", "attention-0", "expert-0-0", "expert-1-0"} <= first.keys()

    # Sizes of another user_config are applied to the same processes.
    submit(application(tmp_path, tiny_checkpoint, 1, 2))
    until(lambda: sum(name.startswith("expert") for name in ready()) == 4)
    second = members()
    assert {name: second[name]["pid"] for name in first} == {
        name: member["pid"] for name, member in first.items()
    }

    # Neither the loss of Serve's replica nor that of the supervisor costs an actor.
    os.kill(second["supervisor"]["pid"], signal.SIGKILL)
    assert post(max_tokens=8)["choices"][0]["token_ids"] == answer
    until(lambda: members()["supervisor"]["pid"] != second["supervisor"]["pid"])
    third = members()
    del third["supervisor"], second["supervisor"]
    assert {n: m["pid"] for n, m in third.items()} == {n: m["pid"] for n, m in second.items()}
    os.kill(third["expert-0-0"]["pid"], signal.SIGKILL)  # it keeps those whom it did not start
    until(lambda: members()["expert-0-0"]["restarts"] == 1)
    until(lambda: members()["expert-0-0"]["state"] == "ready")

    # Another node takes what the first one had.
    nodes.add_node(num_cpus=1, resources=ATTENTION, object_store_memory=MEMORY_BYTES)
    node, gateway = third["attention-0"]["node_id"], third["gateway-0"]["address"]
    drained = run("drain", "--node", node, "--endpoint", gateway)
    assert drained.code in (0, 3), drained.stderr  # 3: nobody listens there any more
    until(lambda: [n for n, m in members().items() if m["node_id"] == node] in ([], ["supervisor"]))
    until(lambda: "attention-1" in ready())
    assert post(max_tokens=8)["choices"][0]["token_ids"] == answer

    pids = [member["pid"] for member in members().values()]
    serve.delete("model1")
    wait_until_gone(pids, 60)
