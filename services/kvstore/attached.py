"""Owns the conversation with one worker: what it asks of the store, and what is leased to it.

Messages in, messages out; what they mean is the store's business, and what the worker's threads may
touch is the lease book's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine

from model1.errors import InvalidRequest
from protos import kvstore_pb2
from services.kv_keys import KEY_BYTES
from services.kvstore.blob import Damaged, read_header
from services.kvstore.leases import Holder, LeaseBook
from services.kvstore.loads import Found, Identity
from services.kvstore.ram import Reservation, Resident
from services.kvstore.store import BLOBS_PER_BREATH, TieredStore
from services.kvstore.tier import Tier

log = logging.getLogger(__name__)

TIER_TO_WIRE = {
    Tier.RAM: kvstore_pb2.KV_TIER_RAM,
    Tier.DISK: kvstore_pb2.KV_TIER_DISK,
    Tier.PEER: kvstore_pb2.KV_TIER_PEER,
    Tier.COLD: kvstore_pb2.KV_TIER_COLD,
}
MAX_KEYS_PER_CALL = 65_536
# Grants that are ready at the same moment travel together.
MAX_GRANTS_PER_MESSAGE = BLOBS_PER_BREATH


class AttachedWorker:
    """One stream of a worker. `outbox` is what `duplex.answer` writes."""

    def __init__(self, store: TieredStore, leases: LeaseBook) -> None:
        self.outbox: asyncio.Queue[kvstore_pb2.StoreMessage] = asyncio.Queue()
        self._store = store
        self._leases = leases
        self._holder: Holder | None = None
        self._identity: Identity | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def receive(self, message: kvstore_pb2.WorkerMessage) -> None:
        """Raises InvalidRequest for what no worker of ours sends: then the stream has to end."""
        body = message.WhichOneof("body")
        if body == "hello":
            self._hello(message.hello)
            return
        holder = self._holder
        if holder is None:
            raise InvalidRequest("a worker says hello first")
        match body:
            case "locate":
                keys = split_keys(message.locate.keys)
                timeout_seconds = _checked(message.locate.timeout_seconds)
                self._run(message.call_id, self._locate(message.call_id, keys, timeout_seconds))
            case "acquire":
                keys = split_keys(message.acquire.keys)
                timeout_seconds = _checked(message.acquire.timeout_seconds)
                work = self._acquire(message.call_id, keys, timeout_seconds, holder)
                self._run(message.call_id, work)
            case "cancel":
                if task := self._tasks.get(message.call_id):
                    task.cancel()
            case "release":
                for lease in message.release.leases:
                    self._leases.release(holder, lease)
            case "reserve":
                self._reserve(message.call_id, message.reserve, holder)
            case "commit":
                self._commit(message.call_id, message.commit, holder)
            case "damaged":
                self._damaged(message.damaged, holder)
            case "promote":
                self._store.promote(split_keys(message.promote.keys))
            case _:
                raise InvalidRequest(f"not a message of a worker: {body}")

    def abandon(self) -> None:
        """The stream is over. Loads under way go on for whoever else waits for them."""
        for task in self._tasks.values():
            task.cancel()
        if self._holder is not None:
            self._leases.disconnect(self._holder)

    def _hello(self, hello: kvstore_pb2.Hello) -> None:
        if self._holder is not None:
            raise InvalidRequest("a worker says hello once")
        try:
            self._holder = self._leases.connect(hello.client_id)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        self._identity = Identity(hello.model_digest, hello.layout_digest)
        log.info("worker_attached worker=%s", hello.worker)

    async def _locate(self, call_id: int, keys: list[bytes], timeout_seconds: float) -> None:
        tiers = await self._store.locate(keys, timeout_seconds)
        costs = [
            kvstore_pb2.TierCost(
                tier=TIER_TO_WIRE[tier],
                latency_seconds=cost.latency_seconds,
                bytes_per_second=cost.bytes_per_second,
            )
            for tier, cost in self._store.costs().items()
        ]
        located = kvstore_pb2.Located(tiers=bytes(tier or 0 for tier in tiers), costs=costs)
        self._answer(kvstore_pb2.StoreMessage(call_id=call_id, located=located))

    async def _acquire(
        self, call_id: int, keys: list[bytes], timeout_seconds: float, holder: Holder
    ) -> None:
        ready: dict[int, Found | None] = {}

        def flush() -> None:
            if ready:
                granted = self._grant(ready, holder)
                ready.clear()
                self._answer(kvstore_pb2.StoreMessage(call_id=call_id, granted=granted))

        def deliver(index: int, found: Found | None) -> None:
            if not ready:
                asyncio.get_running_loop().call_soon(flush)
            ready[index] = found
            if len(ready) == MAX_GRANTS_PER_MESSAGE:
                flush()

        # Also when it is cancelled: what was found has a user that must become a lease or end.
        try:
            await self._store.acquire(
                keys, deliver, timeout_seconds=timeout_seconds, identity=self._identity
            )
        finally:
            flush()

    def _grant(self, ready: dict[int, Found | None], holder: Holder) -> kvstore_pb2.Granted:
        granted = kvstore_pb2.Granted()
        for index, found in ready.items():
            lease = None if found is None else self._leases.grant(holder, found.resident)
            if found is None or lease is None:
                granted.missed.append(index)
                continue
            span = found.resident.span
            granted.indexes.append(index)
            granted.tiers.append(TIER_TO_WIRE[found.tier])
            granted.leases.append(lease)
            granted.offsets.append(span.offset)
            granted.lengths.append(span.length)
        return granted

    def _reserve(self, call_id: int, call: kvstore_pb2.Reserve, holder: Holder) -> None:
        keys = split_keys(call.keys)
        if len(keys) != len(call.lengths) or not all(call.lengths):
            raise InvalidRequest("a reservation needs a length for each key")
        reserved = kvstore_pb2.Reserved()
        for key, length in zip(keys, call.lengths, strict=True):
            is_present = self._store.holds(key)
            reservation = None if is_present else self._store.ram.reserve(key, length)
            lease = reservation and self._leases.grant(holder, reservation)
            reserved.present.append(is_present)
            reserved.leases.append(lease or 0)
            reserved.offsets.append(reservation.span.offset if reservation else 0)
        self._answer(kvstore_pb2.StoreMessage(call_id=call_id, reserved=reserved))

    def _commit(self, call_id: int, call: kvstore_pb2.Commit, holder: Holder) -> None:
        stored = 0
        for lease in call.leases:
            reservation = self._leases.take(holder, lease)
            if isinstance(reservation, Reservation):
                stored += self._keep(reservation)
            elif reservation is not None:
                self._store.ram.let_go(reservation)
        committed = kvstore_pb2.Committed(stored=stored)
        self._answer(kvstore_pb2.StoreMessage(call_id=call_id, committed=committed))

    def _keep(self, reservation: Reservation) -> bool:
        # The payload is verified when it is read, and before it goes to another tier.
        key, span = reservation.key, reservation.span
        try:
            header = read_header(self._store.ram.arena.view(span))
        except Damaged:
            header = None
        if header is None or (header.key, header.nbytes) != (key, span.length):
            log.warning("commit_refused key=%s", key.hex())
            self._store.ram.abandon(reservation)
            return False
        self._store.insert(reservation, header)
        return True

    def _damaged(self, call: kvstore_pb2.ReportDamaged, holder: Holder) -> None:
        leased = self._leases.take(holder, call.lease)
        if isinstance(leased, Resident):
            self._store.drop_damaged(leased, call.reason)
            self._store.ram.let_go(leased)
        elif leased is not None:
            self._store.ram.abandon(leased)

    def _answer(self, message: kvstore_pb2.StoreMessage) -> None:
        self.outbox.put_nowait(message)

    def _run(self, call_id: int, work: Coroutine[None, None, None]) -> None:
        if call_id in self._tasks:
            work.close()
            raise InvalidRequest(f"call {call_id} is under way already")
        task = self._tasks[call_id] = asyncio.create_task(work)
        task.add_done_callback(lambda _task: self._tasks.pop(call_id))


def _checked(timeout_seconds: float) -> float:
    if not math.isfinite(timeout_seconds):
        raise InvalidRequest(f"a timeout is a number of seconds, not {timeout_seconds}")
    return timeout_seconds


def split_keys(packed: bytes) -> list[bytes]:
    """Raises InvalidRequest unless these are whole keys, and not too many."""
    num_keys, rest = divmod(len(packed), KEY_BYTES)
    if rest or num_keys > MAX_KEYS_PER_CALL:
        raise InvalidRequest(
            f"{len(packed)} bytes are not at most {MAX_KEYS_PER_CALL} keys of {KEY_BYTES}"
        )
    return [packed[start : start + KEY_BYTES] for start in range(0, len(packed), KEY_BYTES)]
