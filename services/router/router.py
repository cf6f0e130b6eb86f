"""Owns the routing table in use, the link to every replica, and the layer crossings under way.

A crossing is split by `routing`, its parts go out on the links, and their rows land in one array
until none is missing. A part whose replica cannot answer is split and sent again; that is the one
path for failure, draining and change of table. Pairs that no replica takes wait for one, bounded.
Knows no worker and no stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services import errors
from services.router.crossing import Crossing, Part, Stranded
from services.router.pairs import added_in_order, gather
from services.router.replica_link import ReplicaLink, ReplicaUnusable
from services.router.routing import ExpertGroup, RoutingTable
from services.wire import LayerRows, MalformedCall, Words, first_outside

log = logging.getLogger(__name__)

MAX_CROSSINGS_UNDER_WAY = 256
CONNECT_TIMEOUT_SECONDS = 10.0
# Long enough for a supervisor to start another process and to load its weights.
REPLICA_WAIT_SECONDS = 30.0
# A replica that refused may take the same rows a little later; it sends no word when it does.
RETRY_PAUSE_SECONDS = 0.1


@dataclass(slots=True)
class RouterCounters:
    """Since the start. `rows` are rows of crossings, before they are split into pairs."""

    calls: int = 0
    rows: int = 0
    failed_calls: int = 0
    resent_parts: int = 0


class Router:
    """Build it inside the event loop; it serves once `update` gave it a table."""

    def __init__(
        self,
        name: str,
        max_crossings_under_way: int = MAX_CROSSINGS_UNDER_WAY,
        replica_wait_seconds: float = REPLICA_WAIT_SECONDS,
    ) -> None:
        self.name = name
        self.counters = RouterCounters()
        self._max_crossings_under_way = max_crossings_under_way
        self._replica_wait_seconds = replica_wait_seconds
        self._table = RoutingTable.of(0, ())  # in use
        self._newest = self._table  # in use too, or about to be
        self._links: dict[str, ReplicaLink] = {}  # of both tables
        self._retired: set[ReplicaLink] = set()  # close when they owe nothing any more
        self._under_way: set[Crossing] = set()
        self._waiting: dict[Crossing, None] = {}  # some of their pairs are stranded; oldest first
        self._changed = asyncio.Event()  # a link was opened, or pairs stranded

    @property
    def table(self) -> RoutingTable:
        return self._table

    @property
    def links(self) -> tuple[ReplicaLink, ...]:
        """Of the table in use."""
        return tuple(self._links[address] for address in sorted(self._table.replicas))

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def update(
        self, table: RoutingTable, connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS
    ) -> tuple[str, ...]:
        """Use `table` from now on; what is under way finishes where it is.

        It is in use at once, unless that would take the last connected replica from an expert: then
        as soon as it would not, or crossings wait, or the timeout is over. Returns when all of its
        replicas are connected or the timeout is over: the addresses that are not (they are tried
        again in the background). An epoch that is not above the newest one, or a table for another
        number of experts, is refused with ValueError.
        """
        self._check_newer(table)
        self._newest = table
        for address in table.replicas - self._links.keys():
            self._links[address] = ReplicaLink(address, self._link_opened)
        give_up_at = asyncio.get_running_loop().time() + connect_timeout_seconds
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(give_up_at):
                    while self._takes_away(table) and not self._waiting:
                        await self._change()
            self._use(table)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(give_up_at):
                    while self._missing(table):
                        await self._change()
        except asyncio.CancelledError:
            if self._newest is table:
                self._newest = self._table
                self._retire_unused()
            raise
        missing = self._missing(table)
        log.info(
            "routing_table_updated router=%s epoch=%d replicas=%d not_connected=%s",
            *(self.name, table.epoch, len(table.replicas), ",".join(missing) or "-"),
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
            crossing.call_at(crossing.deadline, self._expire)
        self._send(crossing, np.arange(crossing.missing_pairs), frozenset(), reason="")

    def cancel(self, crossing: Crossing) -> None:
        if crossing in self._under_way:
            self._leave(crossing)

    async def close(self) -> None:
        for crossing in tuple(self._under_way):
            self._finish(crossing, errors.ExpertsUnavailable(f"router {self.name} is closing"))
        links = (*self._links.values(), *self._retired)
        self._newest = self._table = RoutingTable.of(self._newest.epoch, ())
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
        tried: frozenset[object],
        *,
        reason: str,
    ) -> None:
        if crossing not in self._under_way:
            return  # it ended while its other pairs were sent
        loads = {
            address: link.load
            for address, link in self._links.items()
            if link.connected and link.stream not in tried
        }
        split = self._table.split(crossing.call.expert_ids.reshape(-1)[positions], loads)
        for share in split.shares:
            link = self._links[share.replica]
            part = Part(link, positions[share.positions], tried | {link.stream})
            crossing.parts[part] = link.submit(
                gather(crossing.call, part.positions),
                crossing.deadline,
                partial(self._answered, crossing, part),
            )
        for group, stranded in split.stranded:
            self._strand(crossing, Stranded(group, positions[stranded], tried, reason))

    def _answered(self, crossing: Crossing, part: Part, result: Words | Exception) -> None:
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

    def _strand(self, crossing: Crossing, stranded: Stranded) -> None:
        """They go out again when a link opens or a new table is used, or fail when one crossing
        has waited for too long."""
        if crossing not in self._under_way:
            return
        crossing.stranded.append(stranded)
        self._waiting[crossing] = None
        self._changed.set()
        loop = asyncio.get_running_loop()
        if crossing.give_up_at is None:
            crossing.give_up_at = loop.time() + self._replica_wait_seconds
            crossing.call_at(crossing.give_up_at, self._give_up)
        elif crossing.give_up_at <= loop.time():
            self._give_up(crossing)
        links = (self._links[address] for address in stranded.group.replicas)
        if any(link.stream is not None for link in links):
            crossing.call_at(loop.time() + RETRY_PAUSE_SECONDS, self._try_again, stranded)

    def _try_again(self, crossing: Crossing, stranded: Stranded) -> None:
        if stranded in crossing.stranded:
            crossing.stranded.remove(stranded)
            if not crossing.stranded:
                del self._waiting[crossing]
            self._send(crossing, stranded.positions, frozenset(), reason=stranded.reason)

    def _wake(self) -> None:
        """Pairs that waited may find a replica now."""
        waiting, self._waiting = self._waiting, {}
        for crossing in waiting:
            entries, crossing.stranded = crossing.stranded, []
            for entry in entries:
                self._send(crossing, entry.positions, entry.tried, reason=entry.reason)

    def _give_up(self, crossing: Crossing) -> None:
        if crossing.stranded:
            words = f"layer {crossing.call.layer}: {crossing.stranded[0]}"
            self._finish(crossing, errors.ExpertsUnavailable(words))

    def _expire(self, crossing: Crossing) -> None:
        late = (
            f"layer {crossing.call.layer}: the deadline passed while waiting for "
            f"{crossing.waits_for()}"
        )
        self._finish(crossing, errors.DeadlineExceeded(late))

    def _finish(self, crossing: Crossing, result: NDArray[np.float32] | Exception) -> None:
        self._leave(crossing)
        if isinstance(result, Exception):
            self.counters.failed_calls += 1
        crossing.done(result)

    def _leave(self, crossing: Crossing) -> None:
        self._under_way.discard(crossing)
        self._waiting.pop(crossing, None)
        crossing.stranded.clear()
        crossing.cancel_timers()
        parts, crossing.parts = crossing.parts, {}
        for part, call_id in parts.items():
            part.link.forget(call_id)

    def _link_opened(self) -> None:
        self._changed.set()
        self._wake()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _check_newer(self, table: RoutingTable) -> None:
        if table.epoch <= self._newest.epoch:
            raise ValueError(f"epoch {table.epoch} is not above epoch {self._newest.epoch} in use")
        if self._table.epoch and table.num_experts != self._table.num_experts:
            raise ValueError(
                f"epoch {table.epoch} has {table.num_experts} experts, epoch {self._table.epoch} "
                f"in use has {self._table.num_experts}"
            )

    def _use(self, table: RoutingTable) -> None:
        if table.epoch > self._table.epoch:  # else a newer one came first
            self._table = table
            self._retire_unused()
            self._wake()

    def _takes_away(self, table: RoutingTable) -> bool:
        """Whether an expert that is reached now would have to wait for a replica to connect."""
        lost = {
            expert_id
            for group in table.groups
            if group.replicas and not self._reached(group)
            for expert_id in group.expert_ids
        }
        return any(
            self._reached(group) and not lost.isdisjoint(group.expert_ids)
            for group in self._table.groups
        )

    def _reached(self, group: ExpertGroup) -> bool:
        return any(self._is_connected(address) for address in group.replicas)

    def _is_connected(self, address: str) -> bool:
        link = self._links.get(address)
        return link is not None and link.connected

    def _missing(self, table: RoutingTable) -> tuple[str, ...]:
        return tuple(each for each in sorted(table.replicas) if not self._is_connected(each))

    def _retire_unused(self) -> None:
        wanted = self._table.replicas | self._newest.replicas
        self._retired = {link for link in self._retired if not link.closed}
        for address in self._links.keys() - wanted:
            link = self._links.pop(address)
            self._retired.add(link)
            link.retire()
