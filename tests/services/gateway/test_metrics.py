"""From what members report to families of metrics, as a Prometheus reads them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser

from protos import (
    attention_pb2,
    control_pb2,
    expert_pb2,
    histogram_pb2,
    kvstore_pb2,
    router_pb2,
)
from services.gateway.answer import Final
from services.gateway.counters import RequestCounters
from services.gateway.metrics import Report
from services.gateway.topology import Member, Topology
from services.generation import FinishReason
from services.histogram import Histogram
from tests.services.gateway.scraped import Samples

LABELS = {
    *("version", "outcome", "source", "role", "name", "worker", "why", "store", "tier"),
    *("reason", "quantile", "failure", "step", "router", "replica", "expert", "group", "limit"),
    "le",
}


def member(role: str, name: str, state: str = "ready", **more: Any) -> Member:
    usual: dict[str, Any] = {"address": "10.0.0.7:4000", "pid": 17, "node_id": "n", "requests": 5}
    return Member(name=name, role=role, state=state, **{**usual, **more})


TOPOLOGY = Topology(
    3,
    (
        member("gateway", "gateway-0"),
        member("attention", "attention-0"),
        member("expert", "expert-0-0"),
        member("expert", "expert-1-0", "dead"),
        member("kvstore", "kvstore-0"),
        member("supervisor", "supervisor"),
    ),
)


NUMBERS = {
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
}


def numbered(message: Message, *, but: Sequence[str] = (), start: int = 1000) -> set[float]:
    """Set every number of the message, each to another value; which they are."""
    fields: Any = message.DESCRIPTOR.fields
    values = {
        field.name: start + field.number
        for field in fields
        if field.cpp_type in NUMBERS and not field.is_repeated and field.name not in but
    }
    for name, value in values.items():
        setattr(message, name, value)
    return {float(value) for value in values.values()}


def report(**changes: Any) -> Report:
    stats = attention_pb2.AttentionStatsResponse(worker="attention-0")
    tier = kvstore_pb2.KvTierStat(tier=kvstore_pb2.KV_TIER_DISK)
    stat = kvstore_pb2.KvStatResponse(store="kvstore-0", tiers=[tier])
    usual = Report(
        version="1.2.3",
        is_draining=False,
        num_active=2,
        max_active=4,
        counters=RequestCounters(),
        topology=TOPOLOGY,
        workers=[("attention-0", stats)],
        stores=[("kvstore-0", stat)],
    )
    return replace(usual, **changes)


def samples(of: Report) -> Samples:
    return Samples(text(of))


def text(of: Report) -> str:
    registry = CollectorRegistry()
    registry.register(of)
    return generate_latest(registry).decode()


def values(found: Samples, **labels: str) -> set[float]:
    """Of the samples that have these labels, whatever others they have."""
    all_samples = (sample for family in found.families for sample in family.samples)
    return {each.value for each in all_samples if labels.items() <= each.labels.items()}


def test_every_family_is_named_and_described_by_the_rules() -> None:
    found = samples(report())
    names = [family.name for family in found.families]
    assert len(names) == len(set(names))
    for family in found.families:
        assert family.name.startswith("model1_")
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert family.name.endswith("_seconds") or family.type != "histogram"
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert sample.labels.keys() <= LABELS


def test_a_strict_reader_of_openmetrics_takes_it_too() -> None:
    registry = CollectorRegistry()
    registry.register(report())
    told = exposition.generate_latest(registry).decode()
    families = list(parser.text_string_to_metric_families(told))
    assert len(families) == len(samples(report()).families)


def test_requests_are_counted_as_the_gateway_counts_them() -> None:
    counters = RequestCounters()
    with counters.request() as counted:
        counted.accepted()
        counted.generated(7)
        counted.waited()
        counted.waited()
        counted.continued()
        counted.recomputed(13)
        counted.answered(Final(FinishReason.LENGTH, 11, 7))
    found = samples(report(counters=counters))
    assert found("model1_requests_received_total") == 1
    assert found("model1_requests_accepted_total") == 1
    assert found("model1_requests_in_flight") == 2
    assert found("model1_requests_in_flight_limit") == 4
    assert found("model1_requests_ended_total", outcome="finished") == 1
    assert found.sum("model1_requests_ended_total") == 1
    assert len(list(found.labels("model1_requests_ended_total"))) == 4  # also those at 0
    assert found("model1_prompt_tokens_total", source="unknown") == 11
    assert found("model1_generated_tokens_total") == 7
    assert found("model1_requests_waited_total") == 2
    assert found("model1_requests_continued_total") == 1
    assert found("model1_continued_computed_tokens_total") == 13
    assert found("model1_build_info", version="1.2.3") == 1
    assert found("model1_routing_epoch") == 3


def test_who_answers_is_up_and_of_the_others_the_supervisor_says_so() -> None:
    found = samples(report(stores=[("kvstore-0", "KV store kvstore-0: it is gone")]))
    up = {labels["name"]: found("model1_up", **labels) for labels in found.labels("model1_up")}
    assert up == {
        "attention-0": 1,
        "expert-0-0": 1,
        "expert-1-0": 0,
        "gateway-0": 1,
        "kvstore-0": 0,
        "supervisor": 1,
    }
    assert found("model1_role_requests_total", role="gateway", name="gateway-0") == 5


def test_without_a_supervisor_the_rest_is_told() -> None:
    found = samples(report(topology=None, workers=[("attention-0", "no answer")]))
    assert found("model1_up", role="supervisor", name="supervisor") == 0
    assert found("model1_up", role="attention", name="attention-0") == 0
    assert found("model1_up", role="kvstore", name="kvstore-0") == 1
    assert list(found.labels("model1_routing_epoch")) == []


def test_how_a_worker_overlaps_is_told_by_size_of_step() -> None:
    found_so_far = [
        attention_pb2.AttentionOverlap(max_tokens=64, micro_batches=2, ratio=0.8),
        attention_pb2.AttentionOverlap(max_tokens=512, has_prompts=True, micro_batches=1),
    ]
    stats = attention_pb2.AttentionStatsResponse(steps=9, overlapped_steps=4, overlap=found_so_far)
    found = samples(report(workers=[("attention-0", stats)]))
    assert found("model1_worker_overlapped_steps_total", worker="attention-0") == 4
    assert found("model1_worker_micro_batches", worker="attention-0", step="decode-64") == 2
    assert found("model1_worker_micro_batches", worker="attention-0", step="prompt-512") == 1
    assert values(found, step="decode-64") == {2, 0.8}
    assert values(found, step="prompt-512") == {1}  # not tried yet


def test_no_number_of_a_workers_kv_is_forgotten() -> None:
    stats = attention_pb2.AttentionStatsResponse(running_sequences=1, waiting_sequences=2)
    numbers = numbered(stats.kv)
    numbers |= numbered(stats.kv.hit, start=2000) | numbered(stats.kv.restored, start=3000)
    found = samples(report(workers=[("attention-0", stats)]))
    worker = "attention-0"
    assert numbers - values(found, worker=worker) == set()
    assert found("model1_worker_running_sequences", worker=worker) == 1
    assert found("model1_worker_waiting_sequences", worker=worker) == 2
    assert found("model1_worker_hit_tokens_total", worker=worker, source="disk") == 2003
    assert found("model1_worker_restored_tokens_total", worker=worker, source="disk") == 3003
    late = found("model1_worker_recomputed_tokens_total", worker=worker, why="late")
    assert late == stats.kv.late_tokens
    assert found("model1_worker_kv_limit_blocks", worker=worker) == stats.kv.max_blocks


def dispatching() -> tuple[Topology, set[float], set[float], set[float]]:
    """A router that knows a replica, and one that has gone; the numbers of the first two, and of
    the link between them."""
    router = control_pb2.RoleStats(router=router_pb2.RouterStatsResponse(expert_pairs=[7, 0, 9]))
    link = router.router.replicas.add(address="10.0.0.8:1", connected=True)
    router.router.replicas.add(address="10.0.0.8:2")
    expert = control_pb2.RoleStats(expert=expert_pb2.ExpertStatsResponse())
    of_router = numbered(router.router, but=("epoch",))
    of_link = numbered(link, but=("calls", "pairs"), start=2000)
    of_expert = numbered(expert.expert, but=("rows",), start=3000)
    members = (
        member("router", "router-0", stats=router, restarts=2),
        member("expert", "expert-0-0", address="10.0.0.8:1", stats=expert),
    )
    return Topology(3, members), of_router, of_link, of_expert


def test_no_number_of_a_router_or_a_replica_is_forgotten() -> None:
    topology, of_router, of_link, of_expert = dispatching()
    found = samples(report(topology=topology))
    assert of_router - values(found, router="router-0") == set()
    assert of_link - values(found, router="router-0", replica="expert-0-0") == set()
    assert of_expert - values(found, replica="expert-0-0") == set()
    pairs = "model1_router_expert_pairs_total"
    assert [found(pairs, router="router-0", expert=str(i)) for i in range(3)] == [7, 0, 9]
    assert len(list(found.labels("model1_router_replica_breaks_total"))) == 1
    assert found("model1_restarts_total", role="router", name="router-0") == 2
    assert "10.0.0.8" not in text(report(topology=topology))


def test_latencies_are_cumulative_in_buckets_and_nothing_is_lost() -> None:
    answers = Histogram()
    for seconds in (0.0014, 0.0016, 0.004, 500.0):
        answers.observe(seconds)
    topology, *_ = dispatching()
    router = topology.members[0].stats.router
    router.replicas[0].answer_seconds.CopyFrom(answers.to_wire())
    router.replicas[1].answer_seconds.CopyFrom(answers.to_wire())
    found = samples(report(topology=topology))
    name, of = "model1_router_answer_seconds", {"router": "router-0"}
    bounds = ("0.001", "0.002", "0.005", "50.0", "+Inf")
    counts = [found(f"{name}_bucket", **of, le=bound) for bound in bounds]
    assert counts == [0, 4, 6, 6, 8]
    assert found(f"{name}_count", **of) == 8
    assert found(f"{name}_sum", **of) == pytest.approx(2 * 500.007)


def test_no_latency_of_a_worker_is_forgotten() -> None:
    stats = attention_pb2.AttentionStatsResponse(filled_seconds=3, oldest_waiting_seconds=5)
    fields: Any = stats.DESCRIPTOR.fields
    names = [field.name for field in fields if field.name.endswith("_seconds")]
    times = [name for name in names if isinstance(getattr(stats, name), histogram_pb2.Histogram)]
    for number, name in enumerate(times, 1):
        getattr(stats, name).CopyFrom(histogram_pb2.Histogram(counts=[number], sum_seconds=1))
    found = samples(report(workers=[("attention-0", stats)]))
    assert [found(f"model1_worker_{name}_count", worker="attention-0") for name in times] == list(
        range(1, len(times) + 1)
    )
    assert len(times) >= 5
    assert found("model1_worker_filled_seconds_total", worker="attention-0") == 3
    assert found("model1_worker_oldest_waiting_seconds", worker="attention-0") == 5


def test_what_is_scaled_by_itself_has_series_of_its_own() -> None:
    workers = control_pb2.Autoscaled(
        role="attention", min_replicas=1, max_replicas=4, replicas=2, desired_replicas=2
    )
    experts = control_pb2.Autoscaled(
        role="expert", expert_group=1, min_replicas=1, max_replicas=8, replicas=3
    )
    experts.desired_replicas, experts.busy_share, experts.queue_seconds = 4, 0.9, 0.02
    experts.last_change, experts.last_change_age_seconds = "3 -> 4: 90% busy", 12.0
    found = samples(report(topology=replace(TOPOLOGY, autoscaled=(workers, experts))))
    of = {"role": "expert", "group": "1"}
    assert found("model1_autoscale_replicas", **of) == 3
    assert found("model1_autoscale_desired_replicas", **of) == 4
    assert found("model1_autoscale_limit_replicas", **of, limit="max") == 8
    assert found("model1_autoscale_busy_ratio", **of) == 0.9
    assert found("model1_autoscale_queue_seconds", **of) == 0.02
    assert found("model1_autoscale_last_change_age_seconds", **of) == 12
    assert found("model1_autoscale_replicas", role="attention", group="") == 2
    assert list(found.labels("model1_autoscale_busy_ratio")) == [of]


def test_no_number_of_a_tier_is_forgotten() -> None:
    tier = kvstore_pb2.KvTierStat(tier=kvstore_pb2.KV_TIER_DISK)
    numbers = numbered(tier)
    tier.damaged["truncated"] = 3
    tier.failures["write ENOSPC"] = 5
    stat = kvstore_pb2.KvStatResponse(tiers=[tier])
    found = samples(report(stores=[("kvstore-0", stat)]))
    of = {"store": "kvstore-0", "tier": "disk"}
    assert numbers - values(found, **of) == set()
    assert found("model1_kv_tier_load_seconds", **of, quantile="0.99") == tier.load_seconds_p99
    assert found("model1_kv_tier_read_bytes_total", **of) == tier.loaded_bytes
    assert found("model1_kv_tier_damaged_blobs_total", **of, reason="truncated") == 3
    assert found.sum("model1_kv_tier_damaged_blobs_total") == 3
    assert found("model1_kv_tier_failures_total", **of, failure="write ENOSPC") == 5


def test_no_number_of_a_store_is_forgotten() -> None:
    stat = kvstore_pb2.KvStatResponse()
    numbers = numbered(stat, but=("uptime_seconds", "workers"))
    numbers |= numbered(stat.sessions, start=2000)
    found = samples(report(stores=[("kvstore-0", stat)]))
    assert numbers - values(found, store="kvstore-0") == set()


def test_what_a_tier_cannot_say_has_no_series() -> None:
    peer = kvstore_pb2.KvTierStat(tier=kvstore_pb2.KV_TIER_PEER)
    found = samples(report(stores=[("kvstore-0", kvstore_pb2.KvStatResponse(tiers=[peer]))]))
    sizes = ("blobs", "used_bytes", "budget_bytes")
    times = ("load_seconds", "load_bytes_per_second", "lifetime_seconds", "reuse_gap_seconds")
    for name in (*sizes, *times):
        assert list(found.labels(f"model1_kv_tier_{name}")) == []
    assert found("model1_kv_tier_hits_total", store="kvstore-0", tier="peer") == 0


def test_session_records_that_no_disk_takes_are_a_degraded_store() -> None:
    sessions = kvstore_pb2.KvSessionsStat(degraded="disk I/O error", waiting=3)
    stat = kvstore_pb2.KvStatResponse(sessions=sessions)
    found = samples(report(stores=[("kvstore-0", stat)]))
    assert found("model1_kv_store_degraded", store="kvstore-0") == 1
    reasons = [{"store": "kvstore-0", "tier": "sessions", "reason": "disk I/O error"}]
    assert list(found.labels("model1_kv_degraded_info")) == reasons


def test_a_degraded_tier_says_so_and_a_working_one_nothing() -> None:
    tiers = [
        kvstore_pb2.KvTierStat(tier=kvstore_pb2.KV_TIER_RAM),
        kvstore_pb2.KvTierStat(tier=kvstore_pb2.KV_TIER_DISK, degraded="write ENOSPC: no space"),
    ]
    found = samples(report(stores=[("kvstore-0", kvstore_pb2.KvStatResponse(tiers=tiers))]))
    assert found("model1_kv_store_degraded", store="kvstore-0") == 1
    assert found("model1_kv_tier_degraded", store="kvstore-0", tier="ram") == 0
    assert found("model1_kv_tier_degraded", store="kvstore-0", tier="disk") == 1
    reasons = [{"store": "kvstore-0", "tier": "disk", "reason": "write ENOSPC"}]
    assert list(found.labels("model1_kv_degraded_info")) == reasons
    working = samples(report())
    assert working("model1_kv_store_degraded", store="kvstore-0") == 0
    assert list(working.labels("model1_kv_degraded_info")) == []


def test_addresses_and_words_of_others_are_no_labels() -> None:
    cold = kvstore_pb2.KvTierStat(
        tier=kvstore_pb2.KV_TIER_COLD,
        degraded="cannot be reached: Error 111 connecting to u:hush@cache.internal:6379",
    )
    cold.damaged["whatever hush"] = 2
    stat = kvstore_pb2.KvStatResponse(tiers=[cold])
    gone = "KV store kvstore-1: failed to connect to 10.0.0.8:5000"
    told = report(stores=[("kvstore-0", stat), ("kvstore-1", gone)])
    for secret in ("hush", "cache.internal", "10.0.0."):
        assert secret not in text(told)
    found = samples(told)
    of = {"store": "kvstore-0", "tier": "cold"}
    assert found("model1_kv_tier_damaged_blobs_total", **of, reason="other") == 2
    assert found("model1_kv_degraded_info", **of, reason="cannot be reached") == 1
    assert found("model1_kv_degraded_info", store="kvstore-1", tier="all", reason="no answer") == 1
