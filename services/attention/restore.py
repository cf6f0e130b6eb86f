"""One prompt's blocks and tails: where they are, what of them to load, and the loading.

Asks the block store, keeps the tails it loads in the worker's `TailCache`, and copies bodies to
where it is told. Whatever goes wrong, what is not in place in the end is computed. Knows no
schedule, and of the pool only how to write a body.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from services.attention.block_store import BlockStore
from services.attention.cost_model import CostModel, Places, Source
from services.attention.restore_plan import RestorePlan
from services.attention.tails import Tail, TailCache

WriteBody: TypeAlias = Callable[[int, memoryview], None]  # (number of the block, its bytes)


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """Of the n blocks that may be restored: `bodies[i]` of block i, `tails[i]` at its end."""

    bodies: Sequence[bytes]
    tails: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.bodies)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreParts:
    """What every restore of a worker uses."""

    store: BlockStore | None
    tails: TailCache
    costs: CostModel
    # A load that takes longer than computing is given up, but not before so long, and after so long
    # however long computing takes.
    min_patience_s: float
    load_timeout_s: float


@dataclass(slots=True)
class _Found:
    """Where a blob can be had, if not already in place."""

    bodies: list[Source | None]
    tails: list[Source | None]


class Restore:
    """Of one request. Holds the tails it needs until `release`."""

    def __init__(self, keys: PromptKeys, parts: RestoreParts) -> None:
        self.keys = keys
        # Which bodies are in place, and where they were when the request came.
        self.origins: list[Source | None] = [None] * len(keys)
        self.was_late = False
        self.is_located = False
        self.num_shared = 0
        self._parts = parts
        self._found = _Found([None] * len(keys), [None] * len(keys))
        self._held: dict[int, Tail] = {}  # by the number of the block that they follow

    def shareable(self, num_on_device: int) -> int:
        """Of the first `num_on_device` blocks, how many end at a boundary whose tail is here."""
        while num_on_device and not self._has_tail(num_on_device - 1):
            num_on_device -= 1
        return num_on_device

    def share(self, num_blocks: int) -> None:
        """So many blocks, as many as `shareable` said, are in place: they were on the device."""
        self.num_shared = num_blocks
        self.origins[:num_blocks] = [Source.DEVICE] * num_blocks
        if num_blocks:  # whatever fails later, none of these is computed again
            self._hold_tail(num_blocks - 1)

    def places(self) -> Places:
        """Where everything is now."""
        bodies = [
            found if origin is None else Source.DEVICE
            for origin, found in zip(self.origins, self._found.bodies, strict=True)
        ]
        tails = [
            Source.DEVICE if self._has_tail(index) else found
            for index, found in enumerate(self._found.tails)
        ]
        return Places(bodies, tails)

    def plan(self) -> RestorePlan:
        """The fastest way to the end of the prompt's blocks, from what is known now."""
        store = self._parts.store
        return self._parts.costs.plan(self.places(), store.costs() if store else {})

    def hold_tails(self, plan: RestorePlan) -> None:
        """Keep those of the plan's tails that are here."""
        for load in plan.loads:
            self._hold_tail(load.end - 1)

    def take_tail(self, boundary: int) -> Tail:
        """The tail at the end of `boundary` blocks, held, for the caller to release."""
        return self._held.pop(boundary - 1)

    def release(self) -> None:
        """Let go of all tails. Not while something is loading."""
        for tail in self._held.values():
            self._parts.tails.release(tail)
        self._held.clear()

    def loaded(self) -> list[int]:
        """The blocks that came from the store."""
        return [index for index, origin in enumerate(self.origins) if origin]

    def unsaved(self) -> list[int]:
        """The shared blocks that the store does not have, as far as it was asked."""
        if not self.is_located:
            return []
        return [index for index in range(self.num_shared) if self._found.bodies[index] is None]

    def is_in_place(self, plan: RestorePlan) -> bool:
        """Nothing of the plan has to be loaded."""
        return not any(self._missing(plan))

    async def locate(self, num_on_device: int) -> None:
        """Ask the store what it has, and have it bring near what is far and wanted.

        So many of the first blocks are on the device now; they may be gone when `share` is called.
        """
        store, keys = self._parts.store, self.keys
        assert store is not None
        self.is_located = True
        tiers = await store.locate([*keys.bodies, *keys.tails])
        found = [None if tier is None else Source(tier) for tier in tiers]
        self._found = _Found(found[: len(keys)], found[len(keys) :])
        bodies, tails = self._missing(self.plan())
        far = [keys.bodies[i] for i in bodies if _is_far(self._found.bodies[i])]
        far += [keys.tails[i] for i in tails if _is_far(self._found.tails[i])]
        if far:
            await store.prefetch(far)
        await self._load_tail_within(num_on_device)

    async def load(self, write_body: WriteBody) -> RestorePlan:
        """Load what the plan wants, again with another plan as long as something was missing.

        Returns a plan of which everything is in place. After the time that it may take, that is
        what has come until then.
        """
        loop = asyncio.get_running_loop()
        plan = self.plan()
        saved_s = self._parts.costs.compute_seconds(len(self._missing(plan)[0]))
        patience_s = min(self._parts.load_timeout_s, max(self._parts.min_patience_s, saved_s))
        deadline_s = loop.time() + patience_s
        while True:
            self.hold_tails(plan)
            bodies, tails = self._missing(plan)
            if not bodies and not tails:
                return plan
            if loop.time() >= deadline_s:
                self.was_late = True
                self._forget_the_rest()
            else:
                await self._load(bodies, tails, write_body, deadline_s)
            plan = self.plan()

    def give_up(self) -> RestorePlan:
        """The plan with what is in place already, and nothing else."""
        self._forget_the_rest()
        plan = self.plan()
        self.hold_tails(plan)
        return plan

    def _has_tail(self, index: int) -> bool:
        return index in self._held or self.keys.tails[index] in self._parts.tails

    def _hold_tail(self, index: int) -> None:
        if index not in self._held:
            tail = self._parts.tails.find(self.keys.tails[index])
            if tail is not None:
                self._held[index] = tail

    def _missing(self, plan: RestorePlan) -> tuple[list[int], list[int]]:
        """The bodies and tails that the plan loads and that are not in place."""
        bodies = [
            index
            for load in plan.loads
            for index in range(load.start, load.end)
            if self.origins[index] is None
        ]
        tails = [load.end - 1 for load in plan.loads if not self._has_tail(load.end - 1)]
        return bodies, tails

    async def _load_tail_within(self, num_on_device: int) -> None:
        """The last tail within the blocks on the device, so that these can be shared."""
        for index in reversed(range(num_on_device)):
            if self._has_tail(index):
                return
            if self._found.tails[index] is not None:
                deadline_s = asyncio.get_running_loop().time() + self._parts.min_patience_s
                await self._load([], [index], _no_bodies, deadline_s)
                return

    async def _load(
        self,
        bodies: Sequence[int],
        tails: Sequence[int],
        write_body: WriteBody,
        deadline_s: float,
    ) -> None:
        """Bring these into place; what does not come is nowhere from now on."""
        store, cache, found = self._parts.store, self._parts.tails, self._found
        assert store is not None
        were = {index: found.bodies[index] for index in bodies}
        for index in bodies:
            found.bodies[index] = None
        for index in tails:
            found.tails[index] = None
        slots = {index: slot for index in tails if (slot := cache.reserve()) is not None}
        tails = list(slots)
        keys = [self.keys.bodies[index] for index in bodies]
        keys += [self.keys.tails[index] for index in tails]

        def consume(number: int, payload: memoryview) -> None:
            if number < len(bodies):
                write_body(bodies[number], payload)
            else:
                buffers[number - len(bodies)][:] = payload

        buffers = [slots[index].buffer for index in tails]
        try:
            async with store.acquire(keys, deadline_s=deadline_s, consume=consume) as blocks:
                async for block in blocks:
                    if block.tier is None:
                        continue
                    if block.index < len(bodies):
                        index = bodies[block.index]
                        # What this request had prefetched comes out of RAM, but was farther away.
                        self.origins[index] = max(Source(block.tier), were[index] or Source.DEVICE)
                    else:
                        index = tails[block.index - len(bodies)]
                        slot = slots.pop(index)
                        self._held[index] = cache.publish(slot, self.keys.tails[index])
        finally:
            for slot in slots.values():
                cache.release(slot)

    def _forget_the_rest(self) -> None:
        self._found = _Found([None] * len(self.keys), [None] * len(self.keys))


def _is_far(source: Source | None) -> bool:
    return source is not None and source > Source.RAM


def _no_bodies(index: int, payload: memoryview) -> None:
    raise AssertionError("no body was asked for")
