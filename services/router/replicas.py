"""Owns the routing table in use and the link to every replica: how one table follows another, and
which replicas may be used now.

Knows no crossing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from services.router.hedging import AnswerTimes
from services.router.replica_link import ReplicaLink
from services.router.routing import ExpertGroup, Load, RoutingTable
from services.tls import Tls

log = logging.getLogger(__name__)


class Replicas:
    """`changed` is called when a replica was connected or another table is in use."""

    def __init__(self, changed: Callable[[], None], tls: Tls | None = None) -> None:
        self._tls = tls
        self.times = AnswerTimes()
        self._changed = changed
        self._table = RoutingTable.of(0, ())  # in use
        self._newest = self._table  # in use too, or about to be
        self._links: dict[str, ReplicaLink] = {}  # of both tables
        self._retired: set[ReplicaLink] = set()  # close when they owe nothing any more
        self._next_table = asyncio.Event()  # it is in use
        self._news = asyncio.Event()  # a link was opened, or somebody began to wait for one

    @property
    def table(self) -> RoutingTable:
        return self._table

    @property
    def links(self) -> tuple[ReplicaLink, ...]:
        """Of the table in use."""
        return tuple(self._links[address] for address in sorted(self._table.replicas))

    def link(self, address: str) -> ReplicaLink:
        return self._links[address]

    def loads(self, tried: frozenset[object]) -> dict[str, Load]:
        """Of the replicas that may be used for pairs that were not on these streams."""
        now = asyncio.get_running_loop().time()
        return {
            address: link.load(now)
            for address, link in self._links.items()
            if link.connected and link.stream not in tried
        }

    def reconsider(self) -> None:
        """Somebody began to wait for a replica: see `update`."""
        self._news.set()

    async def update(
        self, table: RoutingTable, connect_timeout_seconds: float, someone_waits: Callable[[], bool]
    ) -> tuple[str, ...]:
        """See Router.update."""
        self._check(table)
        self._newest = table
        for address in table.replicas - self._links.keys():
            self._links[address] = ReplicaLink(address, self.times, self._link_opened, self._tls)
        give_up_at = asyncio.get_running_loop().time() + connect_timeout_seconds
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(give_up_at):
                    while self._takes_away(table) and not someone_waits():
                        await self._next_news()
            self._use(table)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(give_up_at):
                    while self._missing(table):
                        await self._next_news()
        except asyncio.CancelledError:
            if self._newest is table:
                self._newest = self._table
                self._retire_unused()
            raise
        return self._missing(table)

    async def used(self, epoch: int) -> None:
        """Until the table in use is of this epoch or a later one."""
        while self._table.epoch < epoch:
            await self._next_table.wait()

    async def close(self) -> None:
        links = (*self._links.values(), *self._retired)
        self._newest = self._table = RoutingTable.of(self._newest.epoch, ())
        self._links, self._retired = {}, set()
        await asyncio.gather(*(link.close() for link in links))

    def _link_opened(self) -> None:
        self._news.set()
        self._changed()

    async def _next_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _check(self, table: RoutingTable) -> None:
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
            self._next_table.set()
            self._next_table = asyncio.Event()
            self._retire_unused()
            self._changed()

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
