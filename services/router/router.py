"""Owns the routing table in use, the link to every replica, and the layer crossings under way.

A crossing is split by `routing`, its parts go out on the links, and their rows land in one array
until none is missing. A part whose replica cannot answer is split and sent again; that is the one
path for failure, draining and change of table. Knows no worker and no stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services import errors
from services.router.pairs import added_in_order, gather
from services.router.replica_link import ReplicaLink, ReplicaUnusable
from services.router.routing import NoReplica, RoutingTable
from services.wire import LayerRows, MalformedCall, Words, first_outside

log = logging.getLogger(__name__)

MAX_CROSSINGS_UNDER_WAY = 256
CONNECT_TIMEOUT_SECONDS = 10.0


@dataclass(slots=True)
class RouterCounters:
    """Since the start. `rows` are rows of crossings, before they are split into pairs."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    resent_parts: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Pairs of a crossing that are under way on one link."""

    link: ReplicaLink
    positions: NDArray[np.intp]
    tried: frozenset[str]  # the replicas that had these pairs, this one included


class Crossing:
    """One layer crossing under way: where its pair rows land, and what is still missing.

    `done` is called once, with the sums [T, D] or with the reason why there are none; never after
    Router.cancel.
    """

    def __init__(
        self,
        call: LayerRows,
        timeout_seconds: float | None,
        done: Callable[[NDArray[np.float32] | Exception], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.call = call
        self.done = done
        self.deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        self.timer: asyncio.TimerHandle | None = None
        self.missing_pairs = call.expert_ids.size
        self.pair_rows: Words = np.empty(
            (call.expert_ids.size, call.rows.shape[1]), dtype=call.rows.dtype
        )
        self.parts: dict[_Part, int] = {}  # -> call id on its link


class Router:
    """Build it inside the event loop; it serves once `update` gave it a table."""

    def __init__(self, name: str, max_crossings_under_way: int = MAX_CROSSINGS_UNDER_WAY) -> None:
        self.name = name
        self.counters = RouterCounters()
        self._max_crossings_under_way = max_crossings_under_way
        self._table = RoutingTable.of(0, ())
        self._links: dict[str, ReplicaLink] = {}  # of the table in use
        self._retired: set[ReplicaLink] = set()  # close when they owe nothing any more
        self._under_way: set[Crossing] = set()
        self._updating = asyncio.Lock()

    @property
    def table(self) -> RoutingTable:
        return self._table

    @property
    def links(self) -> tuple[ReplicaLink, ...]:
        return tuple(self._links.values())

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    async def update(
        self, table: RoutingTable, connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS
    ) -> tuple[str, ...]:
        """Use `table` from now on; what is under way finishes where it is.

        Waits first until its new replicas are connected, at most the timeout, and returns the
        addresses that still are not (they are tried again in the background). An epoch that is not
        above the one in use is refused with ValueError.
        """
        async with self._updating:
            if table.epoch <= self._table.epoch:
                raise ValueError(
                    f"epoch {table.epoch} is not above epoch {self._table.epoch} in use"
                )
            links = {
                address: self._links.get(address) or ReplicaLink(address)
                for address in sorted(table.replicas)
            }
            try:
                missing = await _wait_connected(links, connect_timeout_seconds)
            except asyncio.CancelledError:
                self._retire(set(links.values()) - set(self._links.values()))
                raise
            previous, self._table, self._links = self._links, table, links
            self._retire(set(previous.values()) - set(links.values()))
        log.info(
            "routing_table_updated router=%s epoch=%d replicas=%d not_connected=%s",
            *(self.name, table.epoch, len(links), ",".join(missing) or "-"),
        )
        return missing

    def start(self, crossing: Crossing) -> None:
        """Send a crossing's pairs out. Every failure goes to its `done`, even at once."""
        self.counters.calls += 1
        self.counters.rows += len(crossing.call.rows)
        self._under_way.add(crossing)
        try:
            self._check(crossing.call)
        except (MalformedCall, errors.ServiceError) as error:
            self._finish(crossing, error)
            return
        if not crossing.missing_pairs:
            self._finish(crossing, np.zeros(crossing.call.rows.shape, dtype=np.float32))
            return
        if crossing.deadline is not None:
            crossing.timer = asyncio.get_running_loop().call_at(
                crossing.deadline, self._expire, crossing
            )
        self._send(crossing, np.arange(crossing.missing_pairs), frozenset(), reason="")

    def cancel(self, crossing: Crossing) -> None:
        if crossing in self._under_way:
            self._leave(crossing)

    async def close(self) -> None:
        for crossing in tuple(self._under_way):
            self._finish(crossing, errors.ExpertsUnavailable(f"router {self.name} is closing"))
        links = (*self._links.values(), *self._retired)
        self._links, self._retired = {}, set()
        await asyncio.gather(*(link.close() for link in links))

    def _check(self, call: LayerRows) -> None:
        if len(self._under_way) > self._max_crossings_under_way:
            raise errors.QueueFull(
                f"router {self.name} has {self._max_crossings_under_way} layer crossings under way"
            )
        ids = call.expert_ids
        if (stranger := first_outside(ids, self._table.num_experts)) is not None:
            raise errors.ModelMismatch(
                f"expert {stranger}: router {self.name} knows {self._table.num_experts} experts "
                f"(epoch {self._table.epoch})"
            )
        if (ids[:, 1:] < ids[:, :-1]).any():
            raise MalformedCall("expert_ids are not ascending in each row")

    def _send(
        self,
        crossing: Crossing,
        positions: NDArray[np.intp],
        tried: frozenset[str],
        *,
        reason: str,
    ) -> None:
        loads = {
            address: link.load
            for address, link in self._links.items()
            if link.connected and address not in tried
        }
        try:
            shares = self._table.split(crossing.call.expert_ids.reshape(-1)[positions], loads)
        except NoReplica as error:
            words = f"layer {crossing.call.layer}: {error}" + (f" ({reason})" if reason else "")
            self._finish(crossing, errors.ExpertsUnavailable(words))
            return
        for share in shares:
            link = self._links[share.replica]
            part = _Part(link, positions[share.positions], tried | {share.replica})
            crossing.parts[part] = link.submit(
                gather(crossing.call, part.positions),
                crossing.deadline,
                partial(self._answered, crossing, part),
            )

    def _answered(self, crossing: Crossing, part: _Part, result: Words | Exception) -> None:
        if crossing.parts.pop(part, None) is None:
            return  # another part of it failed for good when the same stream broke
        if isinstance(result, ReplicaUnusable):
            self.counters.resent_parts += 1
            self._send(crossing, part.positions, part.tried, reason=str(result))
        elif isinstance(result, Exception):
            self._finish(crossing, result)
        else:
            crossing.pair_rows[part.positions] = result
            crossing.missing_pairs -= len(part.positions)
            if not crossing.missing_pairs:
                num_rows = len(crossing.call.rows)
                self._finish(crossing, added_in_order(crossing.pair_rows, num_rows))

    def _expire(self, crossing: Crossing) -> None:
        waiting_for = ", ".join(sorted(part.link.address for part in crossing.parts))
        late = f"layer {crossing.call.layer}: the deadline passed while waiting for {waiting_for}"
        self._finish(crossing, errors.DeadlineExceeded(late))

    def _finish(self, crossing: Crossing, result: NDArray[np.float32] | Exception) -> None:
        self._leave(crossing)
        if isinstance(result, Exception):
            self.counters.failed_calls += 1
        crossing.done(result)

    def _leave(self, crossing: Crossing) -> None:
        self._under_way.discard(crossing)
        if crossing.timer:
            crossing.timer.cancel()
        parts, crossing.parts = crossing.parts, {}
        for part, call_id in parts.items():
            part.link.forget(call_id)

    def _retire(self, links: set[ReplicaLink]) -> None:
        self._retired = {link for link in self._retired if not link.closed} | links
        for link in links:
            link.retire()


async def _wait_connected(links: dict[str, ReplicaLink], timeout_seconds: float) -> tuple[str, ...]:
    waiting = [
        asyncio.create_task(link.wait_connected()) for link in links.values() if not link.connected
    ]
    if waiting:
        try:
            await asyncio.wait(waiting, timeout=timeout_seconds)
        finally:
            for task in waiting:
                task.cancel()
    return tuple(address for address, link in links.items() if not link.connected)
