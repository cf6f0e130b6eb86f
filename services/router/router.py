"""Owns the layer crossings under way.

A crossing is split by `routing`, its parts go out on the links, and their rows land in one array
until none is missing. A part whose replica cannot answer is split and sent again; that is the one
path for failure, draining and change of table. A part that is out for too long goes to a second
replica as well. Pairs that no replica takes wait for one, bounded. Knows no worker and no stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from services import errors
from services.router.counters import RouterCounters
from services.router.crossing import Crossing, Part, Purpose, Stranded
from services.router.hedging import HEDGE_FLOOR_SECONDS, LOST_MULTIPLE, HedgeBudget
from services.router.pairs import added_in_order, first_flaw, gather
from services.router.replica_link import ReplicaLink, ReplicaUnusable
from services.router.replicas import Replicas
from services.router.retirement import TablesOut
from services.router.routing import Load, RoutingTable, Share, Split
from services.router.warm_up import warm_up
from services.tls import Tls
from services.wire import LayerRows, MalformedCall, Words, first_outside

log = logging.getLogger(__name__)

MAX_CROSSINGS_UNDER_WAY = 256
CONNECT_TIMEOUT_SECONDS = 10.0
# Long enough for a supervisor to start another process and to load its weights.
REPLICA_WAIT_SECONDS = 30.0
# A replica that refused may take the same rows a little later; it sends no word when it does.
RETRY_PAUSE_SECONDS = 0.1


class Router:
    """Build it inside the event loop; it serves once `update` gave it a table."""

    def __init__(
        self,
        name: str,
        max_crossings_under_way: int = MAX_CROSSINGS_UNDER_WAY,
        replica_wait_seconds: float = REPLICA_WAIT_SECONDS,
        tls: Tls | None = None,
    ) -> None:
        warm_up()
        self.name = name
        self.counters = RouterCounters()
        self._max_crossings_under_way = max_crossings_under_way
        self._replica_wait_seconds = replica_wait_seconds
        self._replicas = Replicas(changed=self._wake, tls=tls)
        self._budget = HedgeBudget()
        self._tables_out = TablesOut()
        self._under_way: set[Crossing] = set()
        self._waiting: dict[Crossing, None] = {}  # some of their pairs are stranded; oldest first

    @property
    def table(self) -> RoutingTable:
        return self._replicas.table

    @property
    def links(self) -> tuple[ReplicaLink, ...]:
        return self._replicas.links

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
        missing = await self._replicas.update(
            table, connect_timeout_seconds, someone_waits=lambda: bool(self._waiting)
        )
        log.info(
            "routing_table_updated router=%s epoch=%d replicas=%d not_connected=%s",
            *(self.name, table.epoch, len(table.replicas), ",".join(missing) or "-"),
        )
        return missing

    async def retired(self, epoch: int) -> None:
        """Until this epoch or a later one is in use, and no answer is waited for that was asked
        under an earlier one: what only earlier ones say is held where, nobody needs any more."""
        await self._replicas.used(epoch)
        await self._tables_out.wait_retired(epoch)

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
        self.counters.load(crossing.call, self.table.num_experts)
        if crossing.deadline is not None:
            crossing.call_at(crossing.deadline, self._expire)
        self._send(crossing, np.arange(crossing.missing_pairs), frozenset(), reason="")

    def cancel(self, crossing: Crossing) -> None:
        if crossing in self._under_way:
            self._leave(crossing)

    async def close(self) -> None:
        for crossing in tuple(self._under_way):
            self._finish(crossing, errors.ExpertsUnavailable(f"router {self.name} is closing"))
        await self._replicas.close()

    def _check(self, call: LayerRows) -> None:
        if len(self._under_way) > self._max_crossings_under_way:
            raise errors.QueueFull(
                f"router {self.name} has {self._max_crossings_under_way} layer crossings under way"
            )
        num_experts = self.table.num_experts
        if not call.expert_ids.size or first_flaw(call.expert_ids, num_experts) < 0:
            return
        if (stranger := first_outside(call.expert_ids, num_experts)) is not None:
            raise errors.ModelMismatch(
                f"expert {stranger}: router {self.name} knows {num_experts} experts "
                f"(epoch {self.table.epoch})"
            )
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
        loads = self._replicas.loads(tried)
        split = self._split(crossing, positions, loads)
        for replica, share in split.shares:
            self._submit(crossing, replica, share, tried, Purpose.ANSWER)
            self._budget.earn()
        for replica in split.slow:
            self._probe(crossing, positions, {replica: loads[replica]})
        for group, share in split.stranded:
            self._strand(crossing, Stranded(group, share, tried, reason))

    def _split(
        self, crossing: Crossing, positions: NDArray[np.intp], loads: Mapping[str, Load]
    ) -> Split:
        """The table's split, in positions of the crossing."""
        split = self.table.split(crossing.call.expert_ids.reshape(-1)[positions], loads)
        return Split(
            [Share(replica, positions[chosen]) for replica, chosen in split.shares],
            [(group, positions[chosen]) for group, chosen in split.stranded],
            split.slow,
        )

    def _submit(
        self,
        crossing: Crossing,
        replica: str,
        positions: NDArray[np.intp],
        tried: frozenset[object],
        purpose: Purpose,
    ) -> None:
        link = self._replicas.link(replica)
        part = Part(link, positions, tried | {link.stream}, purpose, self.table.epoch)
        answered = partial(self._answered, crossing, part)
        sent = link.submit(gather(crossing.call, positions), crossing.deadline, answered)
        crossing.parts[part] = sent
        self._tables_out.sent(part.epoch)
        crossing.call_at(sent.due, self._overdue, part, sent.due)

    def _answered(self, crossing: Crossing, part: Part, result: Words | Exception) -> None:
        sent = crossing.parts.pop(part, None)
        if sent is None:
            return  # another part of it failed for good when the same stream broke
        self._tables_out.ended(part.epoch)
        if not isinstance(result, Exception):
            if crossing.store(part.positions, result):
                # Of those that came first only: what an answer takes, not what a replica takes.
                self._replicas.times.observe(sent.work_pairs, part.link.heard_at - sent.sent_at)
                self.counters.hedges_won += part.purpose is Purpose.HEDGE
            if not crossing.missing_pairs:
                num_rows = len(crossing.call.rows)
                self._finish(crossing, added_in_order(crossing.pair_rows, num_rows))
            return
        lost = crossing.uncovered(part.positions, asyncio.get_running_loop().time())
        if not len(lost):
            return  # answered, or another replica still has them
        if isinstance(result, ReplicaUnusable):
            self.counters.resent_parts += 1
            self._send(crossing, lost, part.tried, reason=str(result))
        else:
            self._finish(crossing, result)

    def _overdue(self, crossing: Crossing, part: Part, due: float) -> None:
        """The part is out for so long that another replica would long have answered."""
        sent = crossing.parts.get(part)
        if sent is None:
            return
        now = asyncio.get_running_loop().time()
        part.link.overdue_calls += due == sent.due  # else it is not the first look
        next_look_at = now + sent.patience_seconds
        crossing.call_at(next_look_at, self._overdue, part, next_look_at)
        is_lost = (
            part.link.heard_at < sent.sent_at
            and now - sent.sent_at > LOST_MULTIPLE * sent.patience_seconds
        )
        if now - due > HEDGE_FLOOR_SECONDS / 2 and not is_lost:
            return  # we were held up ourselves: the answer may be here, unread
        alone = crossing.uncovered(part.positions, now)
        loads = {
            address: load
            for address, load in self._replicas.loads(part.tried).items()
            if not load.is_suspect
        }
        for replica, positions in self._split(crossing, alone, loads).shares:
            if self._budget.spend() or is_lost:
                self._submit(crossing, replica, positions, part.tried, Purpose.HEDGE)
                self.counters.hedged_parts += 1

    def _probe(
        self, crossing: Crossing, positions: NDArray[np.intp], slow: Mapping[str, Load]
    ) -> None:
        """Slow replicas are chosen by nobody: a copy now and then shows whether they still are."""
        now = asyncio.get_running_loop().time()
        for replica, share in self._split(crossing, positions, slow).shares:
            if self._replicas.link(replica).may_be_probed(now) and self._budget.spend():
                self._submit(crossing, replica, share, frozenset(), Purpose.PROBE)
                self.counters.probe_parts += 1

    def _strand(self, crossing: Crossing, stranded: Stranded) -> None:
        """They go out again when a link opens or a new table is used, or fail when one crossing
        has waited for too long."""
        if crossing not in self._under_way:
            return
        loop = asyncio.get_running_loop()
        crossing.stranded.append(stranded)
        self._waiting[crossing] = None
        self._replicas.reconsider()
        if crossing.give_up_at is None:
            crossing.give_up_at = loop.time() + self._replica_wait_seconds
            crossing.call_at(crossing.give_up_at, self._give_up)
        elif crossing.give_up_at <= loop.time():
            self._give_up(crossing)
            return
        links = map(self._replicas.link, stranded.group.replicas)
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
        for part, sent in parts.items():
            part.link.forget(sent)
            self._tables_out.ended(part.epoch)
