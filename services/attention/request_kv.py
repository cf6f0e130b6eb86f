"""What one request holds of the KV cache: its blocks, and where in its history it stands.

From arrival to the end: look up what is known of the prompt; take the blocks, shared ones first;
load what is worth it; then, as steps go on, name finished blocks, keep tails at resume points and
offer both to write-back. Where bodies were missing, the sequence *jumps*: it computes up to the end
of the gap, and goes on from a later tail::

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

from model1.kv_pool import KVHandle, KVPool
from services.attention.cost_model import Places, Source, free_plan
from services.attention.restore import PromptKeys, Restore, RestoreParts
from services.attention.restore_plan import RestorePlan
from services.attention.stats import KvCounters
from services.attention.tails import Tail, TailCache
from services.attention.writeback import WriteBack
from services.generation import GenerationRequest, KvUsage
from services.kv_keys import KeyChain

log = logging.getLogger(__name__)

Spawn: TypeAlias = Callable[[Coroutine[object, object, None]], "asyncio.Task[None]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKvParts:
    """What the requests of a worker share."""

    pool: KVPool
    tails: TailCache
    write_back: WriteBack | None
    counters: KvCounters
    restore: RestoreParts
    resume_every_blocks: int
    spawn: Spawn
    on_change: Callable[[], None]


class _Jump(NamedTuple):
    """At boundary `start`, go on from the tail at boundary `end`: what is between is in place."""

    start: int  # boundaries, in blocks
    end: int
    tail: Tail


class _LastTail(NamedTuple):
    """The latest boundary at which the sequence could be resumed."""

    tail: Tail
    boundary: int
    is_resume_point: bool  # one of every N; else only the last of a turn is of use
    is_saved: bool


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
        self._block_tokens = parts.pool.layout.block_tokens
        self._chain = KeyChain(root, block_tokens=self._block_tokens)
        self._chain.extend(request.token_ids)
        # At least one token of the prompt is computed: its logits are wanted.
        num_blocks = (len(request.token_ids) - 1) // self._block_tokens
        self._restore = Restore(
            PromptKeys(
                self._chain.body_keys[:num_blocks],
                [self._chain.tail_key(boundary) for boundary in range(1, num_blocks + 1)],
            ),
            parts.restore,
        )
        self._is_located = False
        self._handle: KVHandle | None = None
        self._jumps: deque[_Jump] = deque()
        self._num_named = 0  # blocks
        self._unsaved: list[int] = []  # blocks that found no room in the write-back
        self._last_tail: _LastTail | None = None
        self._hoped = _Hoped(Counter(), 0)
        self._has_ended = False
        self._work: asyncio.Task[None] | None = None
        self._find_out()

    # What the scheduler asks.

    @property
    def is_ready(self) -> bool:
        if self._work is None:
            self._find_out()
        return self._work is None

    @property
    def has_room(self) -> bool:
        shared = self._shared_blocks()
        return self._parts.pool.can_allocate(self._request.max_total_tokens, shared)

    def take(self) -> None:
        pool, restore = self._parts.pool, self._restore
        shared = self._shared_blocks()
        self._handle = pool.allocate(self._request.max_total_tokens, shared)
        restore.share(len(shared))
        self._num_named = len(shared)
        plan = restore.plan()
        self._hoped = _Hoped(_hits(restore.places()), plan.num_loaded)
        restore.hold_tails(plan)
        if restore.is_in_place(plan):
            self._begin(plan)
        else:
            self._work = self._parts.spawn(self._load())

    @property
    def is_loading(self) -> bool:
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
        """The next boundary at which a tail is read or a jump begins."""
        done = self.num_tokens // self._block_tokens
        every = self._parts.resume_every_blocks
        stops = [(done // every + 1) * every]
        last = len(self._request.token_ids) // self._block_tokens
        if done < last:
            stops.append(last)
        if self._jumps:
            stops.append(self._jumps[0].start)
        return min(stops) * self._block_tokens

    def computed(self, token_ids: list[int]) -> None:
        num_tokens = self.handle.num_tokens
        self._chain.extend(token_ids[self._chain.num_tokens : num_tokens])
        boundary, rest = divmod(num_tokens, self._block_tokens)
        self._name_blocks(boundary)
        if rest == 0:
            self._keep_tail(boundary)
            if self._jumps and self._jumps[0].start == boundary:
                self._jump()

    def give_back(self) -> None:
        self._has_ended = True
        if self._work is not None:
            # Something may be writing into the blocks until it has ended.
            self._work.cancel()
            self._work.add_done_callback(lambda _: self._free())
        else:
            self._free()

    # Looking up and loading.

    def _find_out(self) -> None:
        """Ask the store, once, unless all that is needed is on the device."""
        store = self._parts.restore.store
        if self._is_located or store is None or not store.connected or self._has_ended:
            return
        if len(self._shared_blocks()) < len(self._restore.keys):
            self._is_located = True
            self._work = self._parts.spawn(self._locate())

    def _shared_blocks(self) -> list[int]:
        """The first blocks, as far as they are on the device and can be resumed after."""
        blocks = self._parts.pool.lookup(self._restore.keys.bodies)
        return blocks[: self._restore.shareable(len(blocks))]

    async def _locate(self) -> None:
        try:
            blocks = self._parts.pool.lookup(self._restore.keys.bodies)
            await self._restore.locate(len(blocks))
        except Exception:
            log.exception("kv_lookup_failed request_id=%s", self._request.request_id)
        self._work_ended()

    async def _load(self) -> None:
        blocks = self.handle.blocks.tolist()
        write_body = self._parts.pool.write_body
        try:
            plan = await self._restore.load(lambda index, data: write_body(blocks[index], data))
        except Exception:
            log.exception("kv_restore_failed request_id=%s", self._request.request_id)
            plan = self._restore.give_up()
        if not self._has_ended:
            self._begin(plan)
        self._work_ended()

    def _work_ended(self) -> None:
        if not self._has_ended:
            self._work = None
        self._parts.on_change()

    def _begin(self, plan: RestorePlan) -> None:
        """Everything that the plan loads is in place: go."""
        self._count(plan)
        for load in plan.loads:
            self._jumps.append(_Jump(load.start, load.end, self._restore.take_tail(load.end)))
        self._restore.release()
        if self._jumps and self._jumps[0].start == 0:
            self._jump()

    def _jump(self) -> None:
        jump = self._jumps.popleft()
        self._parts.pool.write_tail(
            self.handle, jump.end * self._block_tokens, jump.tail.buffer.toreadonly()
        )
        self._name_blocks(jump.end)
        self._set_last_tail(_LastTail(jump.tail, jump.end, is_resume_point=True, is_saved=False))

    # Keeping what was computed.

    def _name_blocks(self, boundary: int) -> None:
        """The blocks before the boundary are complete."""
        for index in range(self._num_named, boundary):
            self._parts.pool.name(self.handle, index, self._chain.body_keys[index])
            origins = self._restore.origins
            if index >= len(origins) or origins[index] is None:
                self._unsaved.append(index)
        self._num_named = max(self._num_named, boundary)
        self._save_blocks()

    def _save_blocks(self) -> None:
        write_back = self._parts.write_back
        if write_back is None:
            self._unsaved.clear()
            return
        self._unsaved = [
            index
            for index in self._unsaved
            if not write_back.offer_body(
                self._chain.body_keys[index], int(self.handle.blocks[index]), index
            )
        ]

    def _keep_tail(self, boundary: int) -> None:
        """The sequence stands at a boundary: read its tail if it may be resumed there."""
        is_resume_point = boundary % self._parts.resume_every_blocks == 0
        is_in_prompt = boundary < len(self._request.token_ids) // self._block_tokens
        if is_in_prompt and not is_resume_point:
            return
        tails = self._parts.tails
        slot = tails.reserve()
        if slot is None:
            self._parts.counters.dropped_blobs += 1
            return
        self._parts.pool.read_tail(self.handle, slot.buffer)
        tail = tails.publish(slot, self._chain.tail_key(boundary))
        self._set_last_tail(_LastTail(tail, boundary, is_resume_point, is_saved=False))
        if is_resume_point:
            self._save_last_tail()

    def _set_last_tail(self, last: _LastTail | None) -> None:
        before, self._last_tail = self._last_tail, last
        if before is None:
            return
        if before.is_resume_point or last is None:
            self._parts.tails.release(before.tail)
        else:
            self._parts.tails.supersede(before.tail)

    def _save_last_tail(self) -> None:
        last, write_back = self._last_tail, self._parts.write_back
        if last is None or last.is_saved or write_back is None:
            return
        if write_back.offer_tail(last.tail, last.boundary * self._block_tokens):
            self._last_tail = last._replace(is_saved=True)
        else:
            self._parts.counters.dropped_blobs += 1

    def _free(self) -> None:
        if self._handle is not None:
            self._save_blocks()
            self._parts.counters.dropped_blobs += len(self._unsaved)
            self._save_last_tail()
            self._parts.pool.free(self._handle)
            self._handle = None
        self._set_last_tail(None)
        for jump in self._jumps:
            self._parts.tails.release(jump.tail)
        self._jumps.clear()
        self._restore.release()
        self._work = None
        self._parts.on_change()

    # Counting, in blocks here and in tokens in the counters.

    def _count(self, plan: RestorePlan) -> None:
        """The sequence begins: what was offered, what came of it, what is left to compute."""
        counters, hoped, was_late = self._parts.counters, self._hoped, self._restore.was_late
        restored = Counter[Source]()
        for load in plan.loads:
            restored.update(_known(self._restore.origins[load.start : load.end]))
        num_prompt = len(self._request.token_ids)
        tokens = {source: restored[source] * self._block_tokens for source in Source}
        computed = num_prompt - sum(tokens.values())
        skipped = hoped.hits.total() - hoped.num_planned
        lost = max(0, hoped.num_planned - plan.num_loaded)
        counters.asked_tokens += num_prompt
        counters.computed_tokens += computed
        counters.restored_tokens.update(tokens)
        for source in Source:  # another request may have brought something nearer since
            most = max(hoped.hits[source], restored[source])
            counters.hit_tokens[source] += most * self._block_tokens
        counters.skipped_tokens += skipped * self._block_tokens
        counters.late_tokens += lost * self._block_tokens if was_late else 0
        counters.failed_tokens += lost * self._block_tokens if not was_late else 0
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
