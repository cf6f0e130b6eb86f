"""`model1 kv`: what the KV stores of a deployment hold, and operators' hands on it."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.message import Message

from cluster.access import Access
from cluster.client import RequestFailed, connected, named_failures
from cluster.output import text_table
from cluster.plain import as_json, enum_word
from protos import attention_pb2, control_pb2, control_pb2_grpc, kvstore_pb2

TIERS = {
    "ram": kvstore_pb2.KV_TIER_RAM,
    "disk": kvstore_pb2.KV_TIER_DISK,
    "redis": kvstore_pb2.KV_TIER_COLD,
}
SOURCES = ("device", "ram", "disk", "peer", "cold")


class KvDamaged(Exception):
    """Blobs did not verify; what is damaged is a miss, and is computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCommand:
    """One question to one gateway, printed as a table or as JSON."""

    access: Access
    as_json: bool

    async def stat(self) -> None:
        async with self._control() as control:
            answer = await control.GetKvStats(control_pb2.GetKvStatsRequest())
        self._print(answer, lambda: f"{tier_table(answer.stores)}\n\n{_workers(answer.workers)}")

    async def verify(self, tier: str, *, repair: bool) -> None:
        """Raises `KvDamaged` if something is and stays damaged, `RequestFailed` as all that change
        something do: if a store did not do it."""
        request = control_pb2.VerifyKvRequest(tier=TIERS[tier], repair=repair)
        async with self._control() as control:
            answer = await control.VerifyKv(request)
        self._print(answer, lambda: _verified(answer))
        _require_all(answer.stores)
        damaged = sum(sum(each.verified.damaged.values()) for each in answer.stores)
        if damaged and not repair:
            raise KvDamaged(f"{damaged} blobs are damaged; --repair forgets them")

    async def evict(self, tier: str, num_bytes: int) -> None:
        request = control_pb2.EvictKvRequest(tier=TIERS[tier], bytes=num_bytes)
        async with self._control() as control:
            answer = await control.EvictKv(request)
        self._print(
            answer,
            lambda: _by_store(
                ("freed bytes",),
                ((each, (each.evicted.freed_bytes,)) for each in answer.stores),
            ),
        )
        _require_all(answer.stores)

    async def collect(self) -> None:
        async with self._control() as control:
            answer = await control.CollectKv(control_pb2.CollectKvRequest())
        self._print(
            answer,
            lambda: _by_store(
                ("dropped blobs", "freed bytes", "leases of dead workers"),
                (
                    (
                        each,
                        (
                            each.collected.dropped_blobs,
                            each.collected.freed_bytes,
                            each.collected.ended_leases,
                        ),
                    )
                    for each in answer.stores
                ),
            ),
        )
        _require_all(answer.stores)

    @asynccontextmanager
    async def _control(self) -> AsyncIterator[control_pb2_grpc.ControlStub]:
        async with connected(self.access) as client:
            with named_failures(self.access.endpoint):
                yield control_pb2_grpc.ControlStub(client.channel)

    def _print(self, answer: Message, as_text: Callable[[], str]) -> None:
        print(as_json(answer) if self.as_json else as_text())


def tier_states(stores: Iterable[control_pb2.KvStatOfStore]) -> str:
    """In short: which tiers there are, whether they work, and how full they are."""
    rows: list[tuple[object, ...]] = []
    for store in stores:
        if store.WhichOneof("outcome") == "unavailable":
            rows.append((store.store, "-", store.unavailable, "-", "-"))
        for tier in store.stat.tiers:
            name, state, _, used, budget, *_ = _tier_row(tier)
            rows.append((store.store, name, state, used, budget))
        if store.stat.sessions.degraded:
            rows.append((store.store, "sessions", store.stat.sessions.degraded, "-", "-"))
    return text_table(("store", "tier", "state", "used", "budget"), rows)


def tier_table(stores: Iterable[control_pb2.KvStatOfStore]) -> str:
    header = (
        *("store", "tier", "state", "blobs", "used", "budget", "hits", "misses", "tokens hit"),
        *("load p50", "load p99", "damaged", "evicted", "dropped"),
    )
    rows: list[tuple[object, ...]] = []
    for store in stores:
        if store.WhichOneof("outcome") == "unavailable":
            rows.append((store.store, "-", store.unavailable, *["-"] * (len(header) - 3)))
        rows += [(store.store, *_tier_row(tier)) for tier in store.stat.tiers]
        sessions = store.stat.sessions
        if sessions.degraded or sessions.damaged:
            numbers = {"blobs": sessions.waiting, "damaged": sessions.damaged}
            state = sessions.degraded or "ok"
            rest = (numbers.get(each, "-") for each in header[3:])
            rows.append((store.store, "sessions", state, *rest))
    return text_table(header, rows)


def _tier_row(tier: kvstore_pb2.KvTierStat) -> tuple[object, ...]:
    return (
        enum_word(kvstore_pb2.KvTier.DESCRIPTOR, tier.tier),
        tier.degraded or "ok",
        tier.blobs if tier.HasField("blobs") else "-",
        _size(tier.used_bytes) if tier.HasField("used_bytes") else "-",
        _size(tier.budget_bytes) if tier.HasField("budget_bytes") else "-",
        tier.hits,
        tier.misses,
        tier.hit_tokens,
        _milliseconds(tier.load_seconds_p50),
        _milliseconds(tier.load_seconds_p99),
        sum(tier.damaged.values()),
        tier.evicted_blobs,
        tier.dropped_blobs,
    )


def _workers(workers: Iterable[control_pb2.KvStatOfWorker]) -> str:
    """Prompt tokens: what was asked for, what each tier gave back, and what was computed."""
    header = (
        *("worker", "tokens asked", *(f"from {source}" for source in SOURCES), "computed"),
        *("skipped", "failed", "late", "blocks held", "cached", "of"),
    )
    rows: list[tuple[object, ...]] = []
    for worker in workers:
        if worker.WhichOneof("outcome") == "unavailable":
            rows.append((worker.worker, worker.unavailable, *["-"] * (len(header) - 2)))
        else:
            rows.append((worker.worker, *_worker_row(worker.stat)))
    return text_table(header, rows)


def _worker_row(stat: attention_pb2.AttentionKvStats) -> tuple[object, ...]:
    return (
        stat.asked_tokens,
        *(getattr(stat.restored, source) for source in SOURCES),
        stat.computed_tokens,
        *(stat.skipped_tokens, stat.failed_tokens, stat.late_tokens),
        *(stat.held_blocks, stat.cached_blocks, stat.max_blocks),
    )


def _verified(answer: control_pb2.VerifyKvResponse) -> str:
    def words(verified: kvstore_pb2.KvVerifyResponse) -> str:
        return ", ".join(f"{num} {why}" for why, num in sorted(verified.damaged.items())) or "none"

    return _by_store(
        ("blobs", "damaged"),
        ((each, (each.verified.blobs, words(each.verified))) for each in answer.stores),
    )


Outcome: TypeAlias = (
    control_pb2.VerifiedStore | control_pb2.EvictedStore | control_pb2.CollectedStore
)


def _require_all(stores: Iterable[Outcome]) -> None:
    """Raises `RequestFailed` for the first store that had no answer."""
    for each in stores:
        if each.WhichOneof("outcome") == "unavailable":
            raise RequestFailed(each.unavailable)


def _by_store(
    header: tuple[str, ...],
    outcomes: Iterable[tuple[Outcome, tuple[object, ...]]],
) -> str:
    """A row a store; one that had no answer says why in place of its first value."""
    rows: list[tuple[object, ...]] = []
    for store, values in outcomes:
        if store.WhichOneof("outcome") == "unavailable":
            values = (store.unavailable, *["-"] * (len(header) - 1))
        rows.append((store.store, *values))
    return text_table(("store", *header), rows)


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{num_bytes / 2**20:.0f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds else "-"
