"""Which attention worker takes the next request, and who is likely to hold the KV of its prompt.

Plain values: knows neither channels nor what a worker really holds. A wrong guess costs time, never
an answer.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.kv_keys import KeyChain, root_key

# A worker that holds the KV saves a copy from its node's memory, which is soon done; it does not
# make up for a queue.
MAX_EXTRA_REQUESTS = 4
# Blocks of 128 tokens that are remembered, of all workers together: about 8 M tokens.
MAX_KNOWN_BLOCKS = 65536

Worker = TypeVar("Worker")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as it is seen when a request asks for one."""

    num_active: int
    looks_down: bool = False
    served_last_turn: bool = False
    knows_prefix: bool = False


def choose(candidates: Sequence[Candidate]) -> int:
    """The index of the one to take: reachable, then the session's last one, then whoever computed
    the longest known prefix, then the least loaded, then the first."""
    up = [each.num_active for each in candidates if not each.looks_down]
    fewest = min(up, default=0)

    def rank(index: int) -> tuple[bool, bool, bool, int]:
        each = candidates[index]
        is_near = each.num_active <= fewest + MAX_EXTRA_REQUESTS
        return (
            each.looks_down,
            not (each.served_last_turn and is_near),
            not (each.knows_prefix and is_near),
            each.num_active,
        )

    return min(range(len(candidates)), key=rank)


class KnownPrefixes(Generic[Worker]):
    """The worker that last computed or restored each block of tokens. The oldest are forgotten."""

    def __init__(self, max_blocks: int = MAX_KNOWN_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._worker_of: OrderedDict[bytes, Worker] = OrderedDict()

    def __len__(self) -> int:
        return len(self._worker_of)

    def worker_of_longest(self, cache_salt: str, token_ids: Sequence[int]) -> Worker | None:
        """Who has the longest known prefix of these tokens, or None."""
        for key in reversed(_block_keys(cache_salt, token_ids)):
            if key in self._worker_of:
                return self._worker_of[key]
        return None

    def learn(self, cache_salt: str, token_ids: Sequence[int], worker: Worker) -> None:
        for key in _block_keys(cache_salt, token_ids):
            self._worker_of[key] = worker
            self._worker_of.move_to_end(key)
        while len(self._worker_of) > self._max_blocks:
            self._worker_of.popitem(last=False)


def _block_keys(cache_salt: str, token_ids: Sequence[int]) -> list[bytes]:
    # Not the keys of the stores: only the gateway's own memory is asked by these.
    chain = KeyChain(root_key(b"", b"", cache_salt))
    chain.extend(token_ids)
    return chain.body_keys
