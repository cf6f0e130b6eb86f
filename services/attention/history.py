"""A sequence's finished blocks and its tails, as steps make them: named, kept, offered to be saved.

Grows with the sequence and never shrinks. A block is named when it is complete, so that others find
it on the device. A tail is read when the sequence stands at a resume point, or at the last boundary
of its prompt or answer, where the next turn will go on. Knows nothing of where a prompt came from.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model1.kv_pool import KVHandle, KVPool
from services.attention.stats import KvCounters
from services.attention.tails import Tail, TailCache
from services.attention.writeback import WriteBack
from services.kv_keys import KeyChain


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryParts:
    """What the histories of a worker share."""

    pool: KVPool
    tails: TailCache
    write_back: WriteBack | None
    counters: KvCounters
    resume_every_blocks: int


class _LastTail(NamedTuple):
    """The latest boundary at which the sequence could be resumed; the tail is held."""

    tail: Tail
    boundary: int
    is_resume_point: bool  # one of every N; else only the last of a turn is of use
    is_saved: bool


class History:
    """Of one sequence. Boundaries are counted in blocks."""

    def __init__(self, root: bytes, prompt: Sequence[int], parts: HistoryParts) -> None:
        self.block_tokens = parts.pool.layout.block_tokens
        self.chain = KeyChain(root, block_tokens=self.block_tokens)
        self.chain.extend(prompt)
        self._last_prompt_boundary = len(prompt) // self.block_tokens
        self._parts = parts
        self._num_named = 0
        self._stored: frozenset[int] = frozenset()
        self._unsaved = deque[int]()  # complete blocks that the write-back has not taken yet
        self._last_tail: _LastTail | None = None

    def begin(self, num_shared: int, unsaved: Iterable[int], stored: Iterable[int]) -> None:
        """The first blocks were on the device, some of them not `unsaved` to the store; those that
        are `stored` came from there."""
        self._num_named = num_shared
        self._unsaved += unsaved
        self._stored = frozenset(stored)

    def next_stop(self, num_tokens: int) -> int:
        """The next boundary at which a tail may be read."""
        done = num_tokens // self.block_tokens
        every = self._parts.resume_every_blocks
        stop = (done // every + 1) * every
        return min(stop, self._last_prompt_boundary) if done < self._last_prompt_boundary else stop

    def computed(self, handle: KVHandle, token_ids: Sequence[int]) -> None:
        """A step went well; `token_ids` is the sequence so far, `handle` says how far it got."""
        self.chain.extend(token_ids[self.chain.num_tokens : handle.num_tokens])
        boundary, rest = divmod(handle.num_tokens, self.block_tokens)
        self._name_blocks(handle, boundary)
        if rest == 0 and self._is_resumed_at(boundary):
            self._keep_tail(handle, boundary)

    def jumped(self, handle: KVHandle, tail: Tail) -> None:
        """The sequence went on from a tail at `handle.num_tokens`, which is this one's now."""
        boundary = handle.num_tokens // self.block_tokens
        self._name_blocks(handle, boundary)
        self._set_last_tail(_LastTail(tail, boundary, is_resume_point=True, is_saved=False))

    def end(self, handle: KVHandle) -> None:
        """The last chance to save, before the handle is freed."""
        self._save_blocks(handle)
        self._parts.counters.dropped_blobs += len(self._unsaved)
        self._save_last_tail()
        self._set_last_tail(None)

    def _is_resumed_at(self, boundary: int) -> bool:
        every = self._parts.resume_every_blocks
        return boundary % every == 0 or boundary >= self._last_prompt_boundary

    def _name_blocks(self, handle: KVHandle, boundary: int) -> None:
        """The blocks before the boundary are complete."""
        for index in range(self._num_named, boundary):
            self._parts.pool.name(handle, index, self.chain.body_keys[index])
            if index not in self._stored:
                self._unsaved.append(index)
        self._num_named = max(self._num_named, boundary)
        self._save_blocks(handle)

    def _save_blocks(self, handle: KVHandle) -> None:
        """As far as there is room: after a refusal the others would be refused, too."""
        write_back = self._parts.write_back
        if write_back is None:
            self._unsaved.clear()
        while write_back is not None and self._unsaved:
            index = self._unsaved[0]
            block = int(handle.blocks[index])
            if not write_back.offer_body(self.chain.body_keys[index], block, index):
                break
            self._unsaved.popleft()

    def _keep_tail(self, handle: KVHandle, boundary: int) -> None:
        slot = self._parts.tails.reserve()
        if slot is None:
            self._parts.counters.dropped_blobs += 1
            return
        self._parts.pool.read_tail(handle, slot.buffer)
        tail = self._parts.tails.publish(slot, self.chain.tail_key(boundary))
        is_resume_point = boundary % self._parts.resume_every_blocks == 0
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
        if write_back.offer_tail(last.tail, last.boundary * self.block_tokens):
            self._last_tail = last._replace(is_saved=True)
        else:
            self._parts.counters.dropped_blobs += 1
