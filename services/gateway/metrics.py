"""What a gateway knows of its deployment as Prometheus metrics: what `model1 status` and `model1 kv
stat` show, and its own counts of requests.

One report becomes families of samples, a row of a table each. Labels hold names of members and
words of ours: no text, token, salt, session or address. Knows nothing of HTTP.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from prometheus_client.core import (
    InfoMetricFamily,
    Metric,
)

from protos import attention_pb2, kvstore_pb2
from services.gateway.control_service import answers
from services.gateway.counters import Outcome, RequestCounters
from services.gateway.families import Family, counter, families, gauge, histogram
from services.gateway.gateway import Gateway
from services.gateway.role_metrics import role_metrics
from services.gateway.topology import Topology, TopologySource
from services.kvstore.blob import DamageReason
from services.kvstore.tier import Tier

log = logging.getLogger(__name__)

# Whom the supervisor asks has 5 s, as have workers and stores; Prometheus itself gives up after 10.
TOPOLOGY_SECONDS = 7.0

WorkerStats: TypeAlias = attention_pb2.AttentionStatsResponse
StoreStats: TypeAlias = kvstore_pb2.KvStatResponse
Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """What one scrape finds out. A string says why there is no answer."""

    version: str
    is_draining: bool
    num_active: int
    max_active: int
    counters: RequestCounters
    topology: Topology | None  # None: the supervisor does not answer
    workers: Sequence[tuple[str, WorkerStats | str]]
    stores: Sequence[tuple[str, StoreStats | str]]

    def collect(self) -> Iterator[Metric]:
        """As a registry of prometheus_client asks for it."""
        yield InfoMetricFamily("model1_build", "What is deployed.", {"version": self.version})
        yield from families(_GATEWAY, (), [((), self)])
        yield from families(_MEMBER, ("role", "name"), _members(self))
        yield from role_metrics(self.topology)
        workers = [((name,), stats) for name, stats in self.workers if not isinstance(stats, str)]
        yield from families(_WORKER, ("worker",), workers)
        yield from families(_STORE, ("store",), [((name,), stats) for name, stats in self.stores])
        tiers = list(_tiers(self.stores))
        yield from families(_TIER, ("store", "tier"), tiers)
        why = InfoMetricFamily(
            "model1_kv_degraded",
            "Why a store or a tier of it is not what it should be; no series while it works.",
            labels=("store", "tier"),
        )
        for (store, tier), reason in _degraded(self.stores):
            why.add_metric((store, tier), {"reason": reason})
        yield why


async def ask_all(gateway: Gateway, version: str, topology: TopologySource) -> Report:
    """What everybody says now. Takes 7 s at most; whoever says nothing by then is away."""
    members, workers, stores = await asyncio.gather(
        _topology_or_none(topology),
        answers([(worker.row.name, worker.stats()) for worker in gateway.workers.all]),
        answers([(store.row.name, store.stat()) for store in gateway.sessions.stores.all]),
    )
    return Report(
        version=version,
        is_draining=gateway.is_draining,
        num_active=gateway.num_active,
        max_active=gateway.max_active_requests,
        counters=deepcopy(gateway.counters),  # read in another thread, later
        topology=members,
        workers=workers,
        stores=stores,
    )


async def _topology_or_none(source: TopologySource) -> Topology | None:
    try:
        async with asyncio.timeout(TOPOLOGY_SECONDS):
            return await source()
    except Exception as error:  # whatever it is: the rest is worth telling
        log.warning("topology_unknown why=%r", error)
        return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A member of the deployment: whether it is there, and its count of what it is asked."""

    is_up: bool
    requests: int | None = None
    restarts: int | None = None


def _members(report: Report) -> list[tuple[tuple[str, str], _Seen]]:
    """Those the supervisor knows. Workers and stores are up if they answer the gateway."""
    seen = {("supervisor", "supervisor"): _Seen(report.topology is not None)}
    for member in report.topology.members if report.topology else ():
        is_up = member.state in ("ready", "draining")
        seen[member.role, member.name] = _Seen(is_up, member.requests, member.restarts)
    for role, asked in (("attention", report.workers), ("kvstore", report.stores)):
        for name, answer in asked:
            before = seen.get((role, name), _Seen(False))
            seen[role, name] = replace(before, is_up=not isinstance(answer, str))
    return sorted(seen.items(), key=lambda item: item[0])


def _tiers(
    stores: Sequence[tuple[str, StoreStats | str]],
) -> Iterator[tuple[tuple[str, str], kvstore_pb2.KvTierStat]]:
    for name, stats in stores:
        if not isinstance(stats, str):
            for tier in stats.tiers:
                yield (name, _TIER_NAMES.get(tier.tier, str(tier.tier))), tier


def _degraded(
    stores: Sequence[tuple[str, StoreStats | str]],
) -> Iterator[tuple[tuple[str, str], str]]:
    for name, stats in stores:
        if isinstance(stats, str):
            yield (name, "all"), "no answer"
        elif stats.sessions.degraded:
            yield (name, "sessions"), _bounded(stats.sessions.degraded)
    for names, tier in _tiers(stores):
        if tier.degraded:
            yield names, _bounded(tier.degraded)


def _bounded(reason: str) -> str:
    """What follows is an address, a number or a server's own words, without bound."""
    return reason.partition(":")[0]


def _is_degraded(stats: StoreStats | str) -> bool:
    return (
        isinstance(stats, str)
        or bool(stats.sessions.degraded)
        or any(tier.degraded for tier in stats.tiers)
    )


def _of_store(read: Callable[[StoreStats], float]) -> Callable[[StoreStats | str], float | None]:
    return lambda stats: None if isinstance(stats, str) else read(stats)


def _damaged(tier: kvstore_pb2.KvTierStat) -> dict[str, float]:
    """Every reason, so that a first one is a step from 0. A worker's own word is any string."""
    counts = {str(reason): float(tier.damaged.get(reason, 0)) for reason in DamageReason}
    return {**counts, "other": sum(tier.damaged.values()) - sum(counts.values())}


def _step_size(overlap: attention_pb2.AttentionOverlap) -> str:
    """decode-64: steps that only decode, 33 to 64 tokens."""
    return f"{'prompt' if overlap.has_prompts else 'decode'}-{overlap.max_tokens}"


def _sources(tokens: attention_pb2.AttentionTierTokens) -> dict[str, float]:
    return {
        "device": tokens.device,
        "ram": tokens.ram,
        "disk": tokens.disk,
        "peer": tokens.peer,
        "cold": tokens.cold,
    }


def _load_seconds(tier: kvstore_pb2.KvTierStat) -> dict[str, float]:
    if not tier.load_seconds_p99:  # none yet
        return {}
    return {"0.5": tier.load_seconds_p50, "0.99": tier.load_seconds_p99}


_PROMPT_SOURCES = ("device", "ram", "disk", "peer", "cold", "computed", "unknown")
_TIER_NAMES = {tier.value: tier.name.lower() for tier in Tier}

_GATEWAY: tuple[Family[Report], ...] = (
    gauge(
        "model1_gateway_draining",
        "1 once the gateway admits nothing any more.",
        lambda report: report.is_draining,
    ),
    counter(
        "model1_requests_received_total",
        "Generate requests that came in; each is in flight or has ended.",
        lambda report: report.counters.received,
    ),
    counter(
        "model1_requests_accepted_total",
        "Of these, those that an attention worker has queued.",
        lambda report: report.counters.accepted,
    ),
    gauge(
        "model1_requests_in_flight",
        "Requests that have not ended.",
        lambda report: report.num_active,
    ),
    gauge(
        "model1_requests_in_flight_limit",
        "How many the gateway takes at once.",
        lambda report: report.max_active,
    ),
    counter(
        "model1_requests_ended_total",
        "Requests by how they ended: finished; cancelled, by the client, its deadline or an abort; "
        "rejected, invalid or for lack of room, before a worker had queued it; failed, the rest.",
        lambda report: {str(each): report.counters.ended[each] for each in Outcome},
        "outcome",
    ),
    counter(
        "model1_prompt_tokens_total",
        "Prompt tokens of finished requests, history included, by where their KV came from: a tier "
        "(cold is Redis), or computed.",
        lambda report: {each: report.counters.prompt_tokens[each] for each in _PROMPT_SOURCES},
        "source",
    ),
    counter(
        "model1_generated_tokens_total",
        "Tokens generated for clients, whether the request finished or not.",
        lambda report: report.counters.generated_tokens,
    ),
    counter(
        "model1_requests_continued_total",
        "Times that an attention worker went on with a request that another one had queued and "
        "was lost with.",
        lambda report: report.counters.continued,
    ),
    counter(
        "model1_continued_computed_tokens_total",
        "Tokens of prompt and answer that these workers computed before they could go on, as no "
        "tier had their KV; counted when they give their first token.",
        lambda report: report.counters.recomputed_tokens,
    ),
    counter(
        "model1_requests_waited_total",
        "Times that no attention worker could take a request, or go on with it, and it waited.",
        lambda report: report.counters.waited,
    ),
    histogram(
        "model1_first_token_seconds",
        "From receiving a request to its first token.",
        lambda report: report.counters.first_token_seconds.to_wire(),
    ),
    gauge(
        "model1_routing_epoch",
        "Epoch of the routing table in use.",
        lambda report: report.topology.epoch if report.topology else None,
    ),
)

_MEMBER: tuple[Family[_Seen], ...] = (
    gauge(
        "model1_up",
        "1 if it serves: a worker or a KV store answers the gateway, of the others the supervisor "
        "says so. While that does not answer, the others have no series.",
        lambda seen: seen.is_up,
    ),
    counter(
        "model1_role_requests_total",
        "Requests of a gateway or an attention worker, layer crossings of a router or an expert "
        "replica, messages of a KV store.",
        lambda seen: seen.requests,
    ),
    counter(
        "model1_restarts_total",
        "How often its process was started again.",
        lambda seen: seen.restarts,
    ),
)

_WORKER: tuple[Family[WorkerStats], ...] = (
    gauge(
        "model1_worker_running_sequences",
        "Sequences in the batch.",
        lambda stats: stats.running_sequences,
    ),
    gauge(
        "model1_worker_waiting_sequences",
        "Sequences that wait for room in the batch.",
        lambda stats: stats.waiting_sequences,
    ),
    counter("model1_worker_steps_total", "Forward steps.", lambda stats: stats.steps),
    counter(
        "model1_worker_overlapped_steps_total",
        "Of these, those that ran as two micro-batches, which compute while the other's rows are "
        "away.",
        lambda stats: stats.overlapped_steps,
    ),
    gauge(
        "model1_worker_micro_batches",
        "1 or 2: what is faster for steps of up to so many tokens, as measured.",
        lambda stats: {_step_size(each): each.micro_batches for each in stats.overlap},
        "step",
    ),
    gauge(
        "model1_worker_overlap_ratio",
        "Time of a step as two micro-batches over that as one, when both were tried last.",
        lambda stats: {_step_size(each): each.ratio for each in stats.overlap if each.ratio},
        "step",
    ),
    counter(
        "model1_worker_layer_crossings_total",
        "Rows of one layer sent to the routed experts, and their sum received.",
        lambda stats: stats.layer_crossings,
    ),
    histogram(
        "model1_worker_queue_seconds",
        "From accepting a request to the first step that it is in.",
        lambda stats: stats.queue_seconds,
    ),
    gauge(
        "model1_worker_oldest_waiting_seconds",
        "How long the oldest of the waiting sequences has waited.",
        lambda stats: stats.oldest_waiting_seconds,
    ),
    histogram(
        "model1_worker_first_token_seconds",
        "From accepting a request to its first token.",
        lambda stats: stats.first_token_seconds,
    ),
    histogram(
        "model1_worker_step_seconds",
        "A forward step.",
        lambda stats: stats.step_seconds,
    ),
    counter(
        "model1_worker_filled_seconds_total",
        "Time of all steps, each as far as it was full: of its sequences or of its tokens.",
        lambda stats: stats.filled_seconds,
    ),
    histogram(
        "model1_worker_crossing_seconds",
        "From handing the rows of a layer to the router to their sum.",
        lambda stats: stats.crossing_seconds,
    ),
    histogram(
        "model1_worker_crossing_wait_seconds",
        "The part of it that the worker had nothing to compute.",
        lambda stats: stats.crossing_wait_seconds,
    ),
    counter(
        "model1_worker_generated_tokens_total",
        "Tokens sampled.",
        lambda stats: stats.completion_tokens,
    ),
    counter(
        "model1_worker_asked_tokens_total",
        "Prompt tokens of the requests that began to compute: what could have been reused.",
        lambda stats: stats.kv.asked_tokens,
    ),
    counter(
        "model1_worker_hit_tokens_total",
        "Of the tokens asked, what each tier said it has; the fastest one counts.",
        lambda stats: _sources(stats.kv.hit),
        "source",
    ),
    counter(
        "model1_worker_restored_tokens_total",
        "Of the tokens asked, what each tier delivered and a request went on from.",
        lambda stats: _sources(stats.kv.restored),
        "source",
    ),
    counter(
        "model1_worker_computed_tokens_total",
        "Prompt tokens computed, whether any tier had them or not.",
        lambda stats: stats.kv.computed_tokens,
    ),
    counter(
        "model1_worker_recomputed_tokens_total",
        "Hit, yet computed: skipped, as computing was predicted to be faster; failed, as bytes did "
        "not verify or did not come; late, as loading took longer than a request may wait.",
        lambda stats: {
            "skipped": stats.kv.skipped_tokens,
            "failed": stats.kv.failed_tokens,
            "late": stats.kv.late_tokens,
        },
        "why",
    ),
    gauge(
        "model1_worker_kv_held_blocks",
        "Blocks of the device's KV pool that live requests hold.",
        lambda stats: stats.kv.held_blocks,
    ),
    gauge(
        "model1_worker_kv_cached_blocks",
        "Blocks that no request holds and that are found again until the room is needed.",
        lambda stats: stats.kv.cached_blocks,
    ),
    gauge(
        "model1_worker_kv_limit_blocks",
        "Blocks that the device's KV pool has in all.",
        lambda stats: stats.kv.max_blocks,
    ),
    gauge("model1_worker_kv_pool_bytes", "Size of the KV pool.", lambda stats: stats.kv.pool_bytes),
    counter(
        "model1_worker_saved_blobs_total",
        "Blocks and tails handed to the KV store.",
        lambda stats: stats.kv.saved_blobs,
    ),
    counter(
        "model1_worker_dropped_blobs_total",
        "Blocks and tails that were not, for lack of room or of a store.",
        lambda stats: stats.kv.dropped_blobs,
    ),
    gauge(
        "model1_worker_waiting_blobs",
        "Blocks and tails that are not handed over yet.",
        lambda stats: stats.kv.waiting_blobs,
    ),
)

_STORE: tuple[Family[StoreStats | str], ...] = (
    gauge(
        "model1_kv_store_degraded",
        "1 if it does not answer, or if one of its tiers or its session records do not work.",
        _is_degraded,
    ),
    gauge(
        "model1_kv_store_leases",
        "Blobs that workers read or write now.",
        _of_store(lambda stats: stats.leases),
    ),
    gauge(
        "model1_kv_store_loads",
        "Blobs that are on their way up into RAM.",
        _of_store(lambda stats: stats.loads),
    ),
    counter(
        "model1_kv_store_loads_without_room_total",
        "Loads that ended because RAM had no room.",
        _of_store(lambda stats: stats.loads_without_room),
    ),
    counter(
        "model1_kv_store_refused_reservations_total",
        "Blobs of workers that RAM had no room for.",
        _of_store(lambda stats: stats.refused_reservations),
    ),
    gauge(
        "model1_kv_store_pinned_keys",
        "Keys that eviction spares.",
        _of_store(lambda stats: stats.pinned_keys),
    ),
    gauge(
        "model1_kv_store_waiting_sessions",
        "Session records in memory that no disk has taken.",
        _of_store(lambda stats: stats.sessions.waiting),
    ),
    counter(
        "model1_kv_store_damaged_sessions_total",
        "Session records that did not verify and were not served.",
        _of_store(lambda stats: stats.sessions.damaged),
    ),
)

_TIER: tuple[Family[kvstore_pb2.KvTierStat], ...] = (
    gauge(
        "model1_kv_tier_degraded",
        "1 if the tier does not work; model1_kv_degraded_info says why.",
        lambda tier: bool(tier.degraded),
    ),
    gauge(
        "model1_kv_tier_blobs",
        "Blobs in the tier.",
        lambda tier: tier.blobs if tier.HasField("blobs") else None,
    ),
    gauge(
        "model1_kv_tier_used_bytes",
        "Bytes in the tier.",
        lambda tier: tier.used_bytes if tier.HasField("used_bytes") else None,
    ),
    gauge(
        "model1_kv_tier_budget_bytes",
        "Bytes that the tier may hold.",
        lambda tier: tier.budget_bytes if tier.HasField("budget_bytes") else None,
    ),
    counter(
        "model1_kv_tier_hits_total",
        "Blobs that were looked up and found in the tier.",
        lambda tier: tier.hits,
    ),
    counter(
        "model1_kv_tier_misses_total",
        "Blobs that were looked up and not found in the tier.",
        lambda tier: tier.misses,
    ),
    counter(
        "model1_kv_tier_hit_tokens_total",
        "Tokens of the blobs that were found.",
        lambda tier: tier.hit_tokens,
    ),
    counter(
        "model1_kv_tier_read_bytes_total",
        "Bytes read from the tier by others than verification.",
        lambda tier: tier.loaded_bytes,
    ),
    counter(
        "model1_kv_tier_written_bytes_total",
        "Bytes written to the tier in the background; RAM: by workers and loads.",
        lambda tier: tier.stored_bytes,
    ),
    counter(
        "model1_kv_tier_written_blobs_total",
        "Blobs written to the tier in the background; RAM: by workers and loads.",
        lambda tier: tier.stored_blobs,
    ),
    gauge(
        "model1_kv_tier_load_seconds",
        "Time of the last loads into RAM, as quantiles; no series before the first.",
        _load_seconds,
        "quantile",
    ),
    gauge(
        "model1_kv_tier_load_bytes_per_second",
        "Rate of the last loads, measured or estimated; no series before.",
        lambda tier: tier.bytes_per_second or None,
    ),
    counter(
        "model1_kv_tier_damaged_blobs_total",
        "Blobs that did not verify and were not served, by what was wrong first.",
        _damaged,
        "reason",
    ),
    counter(
        "model1_kv_tier_evicted_blobs_total",
        "Blobs evicted for room.",
        lambda tier: tier.evicted_blobs,
    ),
    counter(
        "model1_kv_tier_lost_blobs_total",
        "Blobs evicted from RAM while no other tier had them.",
        lambda tier: tier.lost_blobs,
    ),
    gauge(
        "model1_kv_tier_lifetime_seconds",
        "RAM: how long an evicted blob had been there, mean since the start; no series before.",
        lambda tier: tier.lifetime_seconds or None,
    ),
    gauge(
        "model1_kv_tier_reuse_gap_seconds",
        "RAM: time from a use of a blob to its next, mean since the start; no series before.",
        lambda tier: tier.reuse_gap_seconds or None,
    ),
    gauge(
        "model1_kv_tier_waiting_blobs",
        "Blobs that wait to be written to the tier.",
        lambda tier: tier.waiting_blobs,
    ),
    counter(
        "model1_kv_tier_dropped_blobs_total",
        "Blobs that left RAM before they were written, or were too many to wait.",
        lambda tier: tier.dropped_blobs,
    ),
    counter(
        "model1_kv_tier_refused_blobs_total",
        "Blobs that the tier did not take.",
        lambda tier: tier.refused_blobs,
    ),
    counter(
        "model1_kv_tier_failures_total",
        "Operations of the tier that failed, by what failed.",
        lambda tier: dict(sorted(tier.failures.items())),
        "failure",
    ),
)
