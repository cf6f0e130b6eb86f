"""Three hosts and more, each with the commands that the chart renders for its containers: what is
asked of them over gRPC while they scale, are cut off, lose their head and restart.

The answers are compared token by token with one process's. The tests run in this order on one
cluster, since its start takes most of the time.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import pytest

from cluster.chaos.questions import Question, known_questions
from model1 import shipped_model_dir
from tests.e2e.chart_cluster import (
    ATTENTION_B,
    EXPERTS_B,
    Cluster,
    chart_cluster,
)
from tests.e2e.hosts import require_namespaces, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETS = (
    "experts.replicas=1",
    "attention.workers=1",
    "experts.group.slots=3",
    "settings.kv.ramBytes=67108864",
)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return known_questions(
        shipped_model_dir(), dtype="float32", count=8, seed=1, told=lambda _words: None
    )


@pytest.fixture(scope="module")
def cluster(
    questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    require_namespaces()
    with chart_cluster(tmp_path_factory.mktemp("hosts"), questions, *SETS) as running:
        yield running


def has(cluster: Cluster, host: str, wanted: dict[str, int]) -> bool:
    """So many of each role are ready, as the gateway on that host says."""
    return all(len(cluster.ready(role, host)) == number for role, number in wanted.items())


def test_a_request_is_answered_from_a_fourth_host(cluster: Cluster) -> None:
    endpoint = cluster.endpoint()
    words = ("model1", "generate", "Once upon a time", "--max-tokens", "8")
    here = subprocess.run(
        [sys.executable, "-m", "cluster.main", *words[1:], "--local"],
        capture_output=True,
        text=True,
    )
    assert cluster.client.run(*words, "--endpoint", endpoint) == here.stdout
    for left_out, refusal in (
        (("TOKEN_FILE",), "UNAUTHENTICATED"),
        (("CERT_FILE", "KEY_FILE"), "no gateway answers"),
    ):
        unset = [f"--unset=MODEL1_CLIENT__{name}" for name in left_out]
        with pytest.raises(AssertionError, match=refusal):
            cluster.client.run("env", *unset, *words, "--endpoint", endpoint)
    names = {member["name"] for member in cluster.members()}
    assert {"attention-0", "expert-0-0", "expert-1-0", "supervisor"} <= names


def test_experts_scale_live_when_the_application_says_so(
    cluster: Cluster, questions: list[Question]
) -> None:
    attention = cluster.ready("attention")
    with cluster.traffic(questions) as result:
        cluster.submit("experts.replicas=3")
        cluster.join("experts-b", EXPERTS_B)
        until("6 replicas are ready", lambda: len(cluster.ready("expert")) == 6, 180)
        time.sleep(2)
    assert (result["wrong"], result["failed"]) == ([], [])
    assert result["answered"] > 0
    assert [m["pid"] for m in cluster.ready("attention")] == [m["pid"] for m in attention]


def test_an_expert_node_is_cut_off_and_comes_back(
    cluster: Cluster, questions: list[Question]
) -> None:
    host = cluster.hosts["experts-b"]
    with cluster.traffic(questions) as result:
        host.cut_off()
        until("its replicas are lost", lambda: len(cluster.ready("expert")) == 3, 60)
        time.sleep(10)  # until Ray has given it up, too: then it ends there, and its container
        host.mend()  # starts again
        until("6 replicas are ready", lambda: len(cluster.ready("expert")) == 6, 180)
        time.sleep(2)
    assert (result["wrong"], result["failed"]) == ([], [])
    assert result["answered"] > 0


def test_streams_outlive_the_head_and_the_cluster_is_whole_again(
    cluster: Cluster, questions: list[Question]
) -> None:
    before = {m["name"]: m["pid"] for m in cluster.members()}
    with cluster.traffic(questions) as result:
        cluster.hosts["head"].kill()
        time.sleep(10)
        cluster.start("head")
        until("Serve is back", lambda: cluster.application()["status"] == "RUNNING", 180)
        cluster.submit("experts.replicas=2")
        until("4 replicas are ready", lambda: len(cluster.ready("expert")) == 4, 120)
        cluster.submit("experts.replicas=3")
        until("6 replicas are ready", lambda: len(cluster.ready("expert")) == 6, 180)
    assert (result["wrong"], result["failed"]) == ([], [])
    assert result["answered"] > 0
    after = {m["name"]: m["pid"] for m in cluster.members()}
    assert {n: pid for n, pid in after.items() if "expert" not in n} == {
        n: pid for n, pid in before.items() if "expert" not in n
    }


def test_every_role_restarts_under_load_and_no_request_fails(
    cluster: Cluster, questions: list[Question]
) -> None:
    cluster.join("attention-b", ATTENTION_B)
    cluster.submit("attention.workers=2")
    until("2 workers are ready", lambda: len(cluster.ready("attention")) == 2, 180)
    order = ("experts-a", "experts-b", "attention-a", "attention-b")
    with cluster.traffic(questions) as result:
        for name in order:
            other = "attention-b" if name == "attention-a" else "attention-a"
            cluster.drain(name)
            cluster.hosts[name].kill()
            cluster.start(name)
            wanted = {"expert": 6, "attention": 2, "gateway": 2}
            until(f"all are back after {name}", partial(has, cluster, other, wanted), 240)
    assert (result["wrong"], result["failed"]) == ([], [])
    assert result["answered"] > 0
