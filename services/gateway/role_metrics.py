"""What routers and expert replicas report, and what is scaled by itself, as Prometheus metrics.

Labels hold names of members, numbers of experts and words of ours.
"""

from collections.abc import Iterator

from prometheus_client.core import Metric

from protos import control_pb2, expert_pb2, router_pb2
from services.gateway.families import Family, counter, families, gauge, histogram
from services.gateway.topology import Topology
from services.histogram import Histogram, added


def role_metrics(topology: Topology | None) -> Iterator[Metric]:
    """None, as when the supervisor does not answer: families without samples."""
    members = topology.members if topology else ()
    routers = [
        ((m.name,), m.stats.router) for m in members if m.stats.WhichOneof("role") == "router"
    ]
    replicas = [
        ((m.name,), m.stats.expert) for m in members if m.stats.WhichOneof("role") == "expert"
    ]
    names = {member.address: member.name for member in members}
    links = [
        ((*router, names[link.address]), link)
        for router, stats in routers
        for link in stats.replicas
        if link.address in names  # one that has just gone has no name any more
    ]
    yield from families(_ROUTER, ("router",), routers)
    yield from families(_LINK, ("router", "replica"), links)
    yield from families(_REPLICA, ("replica",), replicas)
    scaled = [
        ((each.role, str(each.expert_group) if each.HasField("expert_group") else ""), each)
        for each in (topology.autoscaled if topology else ())
    ]
    yield from families(_AUTOSCALE, ("role", "group"), scaled)


_ROUTER: tuple[Family[router_pb2.RouterStatsResponse], ...] = (
    counter(
        "model1_router_crossings_total", "Layer crossings of workers.", lambda stats: stats.calls
    ),
    counter(
        "model1_router_failed_crossings_total",
        "Of these, those that a worker was told to have failed.",
        lambda stats: stats.failed_calls,
    ),
    counter("model1_router_rows_total", "Rows of all crossings.", lambda stats: stats.rows),
    gauge(
        "model1_router_crossings_under_way",
        "Crossings that are not answered yet.",
        lambda stats: stats.calls_under_way,
    ),
    gauge(
        "model1_router_waiting_crossings",
        "Of these, those with rows that wait for a replica that takes them.",
        lambda stats: stats.calls_waiting,
    ),
    histogram(
        "model1_router_answer_seconds",
        "From sending rows to a replica to its answer.",
        lambda stats: added(
            Histogram.from_wire(link.answer_seconds) for link in stats.replicas
        ).to_wire(),
    ),
    counter(
        "model1_router_resent_parts_total",
        "Parts of crossings that went to another replica because the first one broke or refused.",
        lambda stats: stats.resent_parts,
    ),
    counter(
        "model1_router_hedged_parts_total",
        "Parts that went to a second replica because the first one took too long.",
        lambda stats: stats.hedged_parts,
    ),
    counter(
        "model1_router_hedges_won_total",
        "Of these, those that the second replica answered first.",
        lambda stats: stats.hedges_won,
    ),
    counter(
        "model1_router_probe_parts_total",
        "Copies that slow replicas got, to see whether they still are.",
        lambda stats: stats.probe_parts,
    ),
    counter(
        "model1_router_expert_pairs_total",
        "Rows that workers asked of each expert.",
        lambda stats: {str(expert): pairs for expert, pairs in enumerate(stats.expert_pairs)},
        "expert",
    ),
)

_LINK: tuple[Family[router_pb2.RouterReplicaStats], ...] = (
    gauge(
        "model1_router_replica_connected",
        "1 while the stream to the replica stands.",
        lambda link: link.connected,
    ),
    gauge(
        "model1_router_replica_suspect",
        "1 while the replica is passed over: late, or wrong a moment ago.",
        lambda link: link.suspect,
    ),
    gauge(
        "model1_router_replica_slowness_ratio",
        "How long the replica takes, 1 being typical of all.",
        lambda link: link.slowness,
    ),
    gauge(
        "model1_router_replica_outstanding_pairs",
        "(row, expert) pairs that it owes an answer.",
        lambda link: link.outstanding_pairs,
    ),
    counter(
        "model1_router_replica_breaks_total",
        "Streams to the replica that ended without being asked to.",
        lambda link: link.breaks,
    ),
    counter(
        "model1_router_replica_overdue_calls_total",
        "Calls without an answer when there should have been one; it is suspect until it answers.",
        lambda link: link.overdue_calls,
    ),
    counter(
        "model1_router_replica_wrong_answers_total",
        "Answers of a wrong shape or checksum.",
        lambda link: link.wrong_answers,
    ),
)

_REPLICA: tuple[Family[expert_pb2.ExpertStatsResponse], ...] = (
    counter("model1_replica_calls_total", "Calls computed.", lambda stats: stats.calls),
    counter(
        "model1_replica_pairs_total",
        "(row, expert) pairs computed, the unit of its work.",
        lambda stats: stats.pairs,
    ),
    counter(
        "model1_replica_late_calls_total",
        "Calls past their deadline before their turn.",
        lambda stats: stats.late_calls,
    ),
    counter(
        "model1_replica_failed_calls_total",
        "Calls that could not be computed.",
        lambda stats: stats.failed_calls,
    ),
    counter(
        "model1_replica_busy_seconds_total",
        "Time with a call in hand.",
        lambda stats: stats.busy_seconds,
    ),
    histogram(
        "model1_replica_compute_seconds",
        "The computation of a call alone.",
        lambda stats: stats.compute_seconds,
    ),
)

_AUTOSCALE: tuple[Family[control_pb2.Autoscaled], ...] = (
    gauge(
        "model1_autoscale_replicas",
        "Workers, or replicas of an expert group, that are there or on their way.",
        lambda scaled: scaled.replicas,
    ),
    gauge(
        "model1_autoscale_desired_replicas",
        "How many there should be by the load.",
        lambda scaled: scaled.desired_replicas,
    ),
    gauge(
        "model1_autoscale_limit_replicas",
        "How few and how many there may be.",
        lambda scaled: {"min": scaled.min_replicas, "max": scaled.max_replicas},
        "limit",
    ),
    gauge(
        "model1_autoscale_busy_ratio",
        "Share of the time of replicas, or of what fits into the steps of workers, measured last.",
        lambda scaled: scaled.busy_share if scaled.HasField("busy_share") else None,
    ),
    gauge(
        "model1_autoscale_queue_seconds",
        "How long requests waited for a worker, or rows for a replica, as measured last.",
        lambda scaled: scaled.queue_seconds if scaled.HasField("queue_seconds") else None,
    ),
    gauge(
        "model1_autoscale_last_change_age_seconds",
        "Since the last change; no series before the first.",
        lambda scaled: (
            scaled.last_change_age_seconds if scaled.HasField("last_change_age_seconds") else None
        ),
    ),
)
