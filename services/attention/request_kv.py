"""What one request holds of the KV cache, from its arrival to its end.

It looks up what is known of the prompt, takes its blocks, shared ones first, and loads what is
worth it. Where bodies were missing, the sequence *jumps*: it computes up to the end of the gap, and
goes on from a later tail::

    0        8        16   19      24           31
    |--------|--------|-x--|-------|------------|      x: the body of this block was missing
    |      jump       | compute    |    jump    |
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from model1.kv_pool import KVHandle
from services.attention.cost_model import Places, Source, free_plan
from services.attention.history import History, HistoryParts
from services.attention.restore import PromptKeys, Restore, RestoreParts
from services.attention.restore_plan import RestorePlan
from services.attention.tails import Tail
from services.generation import GenerationRequest, KvUsage

log = logging.getLogger(__name__)

Spawn: TypeAlias = Callable[[Coroutine[object, object, None]], "asyncio.Task[None]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKvParts:
    """What the requests of a worker share."""

    history: HistoryParts
    restore: RestoreParts
    spawn: Spawn
    on_change: Callable[[], None]


class _Jump(NamedTuple):
    """At boundary `start`, go on from the tail at boundary `end`: what is between is in place."""

    start: int  # boundaries, in blocks
    end: int
    tail: Tail


class _Hoped(NamedTuple):
    """When the blocks were taken: what the tiers offered, and how much of it was to be loaded."""

    hits: Counter[Source]
    num_planned: int


class RequestKv:
    """A `KVClaim`. Lives on the engine's loop."""

    def __init__(self, request: GenerationRequest, root: bytes, parts: RequestKvParts) -> None:
        self.root = root
        self.usage = KvUsage(computed_tokens=len(request.token_ids))
        self._request = request
        self._parts = parts
        self._pool = parts.history.pool
        self._history = History(root, request.token_ids, parts.history)
        self._block_tokens = self._history.block_tokens
        # At least one token of the prompt is computed: its logits are wanted.
        num_blocks = (len(request.token_ids) - 1) // self._block_tokens
        chain = self._history.chain
        keys = PromptKeys(
            chain.body_keys[:num_blocks],
            [chain.tail_key(boundary) for boundary in range(1, num_blocks + 1)],
        )
        self._restore = Restore(keys, parts.restore)
        self._handle: KVHandle | None = None
        self._jumps: deque[_Jump] = deque()
        self._hoped = _Hoped(Counter(), 0)
        self._has_ended = False
        self._work: asyncio.Task[None] | None = None  # looking up, later loading
        self._look_up()

    @property
    def is_ready(self) -> bool:
        if self._work is None:
            self._look_up()
        return self._work is None

    @property
    def has_room(self) -> bool:
        return self._pool.can_allocate(self._request.max_total_tokens, self._shared_blocks())

    def take(self) -> None:
        restore, shared = self._restore, self._shared_blocks()
        self._handle = self._pool.allocate(self._request.max_total_tokens, shared)
        restore.share(len(shared))
        plan = restore.plan()
        self._hoped = _Hoped(_hits(restore.places()), plan.num_loaded)
        restore.hold_tails(plan)
        if restore.is_in_place(plan):
            self._begin(plan)
        else:
            self._work = self._parts.spawn(self._load())

    @property
    def is_loading(self) -> bool:
        if self._work is not None and self._work.done():
            self._work.result()  # raises: a bug of ours, which is the engine's to end with
        return self._work is not None

    @property
    def handle(self) -> KVHandle:
        assert self._handle is not None
        return self._handle

    @property
    def num_tokens(self) -> int:
        return self._handle.num_tokens if self._handle is not None else 0

    @property
    def next_stop(self) -> int:
        stop = self._history.next_stop(self.num_tokens)
        if self._jumps:
            stop = min(stop, self._jumps[0].start)
        return stop * self._block_tokens

    def computed(self, token_ids: list[int]) -> None:
        self._history.computed(self.handle, token_ids)
        if self._jumps and self._jumps[0].start * self._block_tokens == self.num_tokens:
            self._jump()

    def give_back(self) -> None:
        self._has_ended = True
        if self._work is not None:
            # Something may be writing into the blocks until it has ended.
            self._work.cancel()
            self._work.add_done_callback(lambda _: self._free())
        else:
            self._free()

    def _look_up(self) -> None:
        """Ask the store, once, unless all that is needed is on the device."""
        store = self._parts.restore.store
        if self._restore.is_located or store is None or not store.connected:
            return
        if len(self._shared_blocks()) < len(self._restore.keys):
            self._work = self._parts.spawn(self._locate())

    def _shared_blocks(self) -> list[int]:
        """The first blocks, as far as they are on the device and can be resumed after."""
        blocks = self._pool.lookup(self._restore.keys.bodies)
        return blocks[: self._restore.shareable(len(blocks))]

    async def _locate(self) -> None:
        try:
            blocks = self._pool.lookup(self._restore.keys.bodies)
            await self._restore.locate(len(blocks))
        except Exception:
            log.exception("kv_lookup_failed request_id=%s", self._request.request_id)
        if not self._has_ended:
            self._work = None

    async def _load(self) -> None:
        blocks, pool = self.handle.blocks.tolist(), self._pool
        try:
            plan = await self._restore.load(
                lambda index, data: pool.write_body(blocks[index], data)
            )
        except Exception:
            log.exception("kv_restore_failed request_id=%s", self._request.request_id)
            plan = self._restore.give_up()
        if not self._has_ended:
            self._begin(plan)
            self._work = None

    def _begin(self, plan: RestorePlan) -> None:
        """Everything that the plan loads is in place: go."""
        restore = self._restore
        self._count(plan)
        self._history.begin(restore.num_shared, restore.unsaved(), restore.loaded())
        for load in plan.loads:
            self._jumps.append(_Jump(load.start, load.end, restore.take_tail(load.end)))
        restore.release()
        if self._jumps and self._jumps[0].start == 0:
            self._jump()

    def _jump(self) -> None:
        jump = self._jumps.popleft()
        position = jump.end * self._block_tokens
        self._pool.write_tail(self.handle, position, jump.tail.buffer.toreadonly())
        self._history.jumped(self.handle, jump.tail)

    def _free(self) -> None:
        if self._handle is not None:
            self._history.end(self._handle)
            self._pool.free(self._handle)
            self._handle = None
        for jump in self._jumps:
            self._parts.history.tails.release(jump.tail)
        self._jumps.clear()
        self._restore.release()
        self._work = None
        self._parts.on_change()

    def _count(self, plan: RestorePlan) -> None:
        """The sequence begins: what was offered, what came of it, what is left to compute."""
        counters, hoped = self._parts.history.counters, self._hoped
        restored = Counter[Source]()
        for load in plan.loads:
            restored.update(_known(self._restore.origins[load.start : load.end]))
        tokens = {source: restored[source] * self._block_tokens for source in Source}
        computed = len(self._request.token_ids) - sum(tokens.values())
        counters.asked_tokens += len(self._request.token_ids)
        counters.computed_tokens += computed
        counters.restored_tokens.update(tokens)
        for source in Source:  # another request may have brought something nearer since
            most = max(hoped.hits[source], restored[source])
            counters.hit_tokens[source] += most * self._block_tokens
        skipped = hoped.hits.total() - hoped.num_planned
        lost = max(0, hoped.num_planned - plan.num_loaded)
        counters.skipped_tokens += skipped * self._block_tokens
        if self._restore.was_late:
            counters.late_tokens += lost * self._block_tokens
        else:
            counters.failed_tokens += lost * self._block_tokens
        self.usage = KvUsage(
            device_tokens=tokens[Source.DEVICE],
            ram_tokens=tokens[Source.RAM],
            disk_tokens=tokens[Source.DISK],
            peer_tokens=tokens[Source.PEER],
            cold_tokens=tokens[Source.COLD],
            computed_tokens=computed,
        )


def _known(sources: Iterable[Source | None]) -> list[Source]:
    return [source for source in sources if source is not None]


def _hits(places: Places) -> Counter[Source]:
    """Blocks of each source that would be of use if loading took no time."""
    hits = Counter[Source]()
    for load in free_plan(places).loads:
        hits.update(_known(places.bodies[load.start : load.end]))
    return hits
