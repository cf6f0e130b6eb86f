"""The KV cache of a worker: the device pool, and what is kept of it elsewhere.

Owns the pool, the tails in host memory, write-back and the background work of restoring. Makes one
`RequestKv` for each request. The device's own prefix cache works without a block store; with one,
blocks that the device gave up come back from there.
"""

import asyncio
import copy
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from model1.kv_pool import KVPool
from services.attention.block_store import BlockStore
from services.attention.cost_model import CostModel
from services.attention.history import HistoryParts
from services.attention.request_kv import RequestKv, RequestKvParts
from services.attention.restore import RestoreParts
from services.attention.stats import KvCounters, KvStats
from services.attention.tails import TailCache
from services.attention.writeback import WriteBack
from services.generation import GenerationRequest
from services.kv_keys import DIGEST_BYTES, root_key

log = logging.getLogger(__name__)

# What still waits to be written back when the worker stops gets so long.
FLUSH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheConfig:
    """What is kept, where, and how long a request waits for it."""

    # A sequence can be resumed at each of these boundaries, and at its last one. A tail is kept for
    # each, as large as the bodies of six to nine blocks: at 8 it doubles what is stored.
    resume_every_blocks: int = 8
    # Blocks that no request used for so long leave the device.
    idle_seconds: float = 300.0
    # A request waits at most so long for the tiers.
    load_timeout_seconds: float = 10.0
    # It waits so long even where computing is predicted to be faster: measured costs err.
    load_patience_seconds: float = 1.0
    # Tails in the worker's own memory. Each running sequence needs one, or its turn cannot be
    # resumed at its end.
    staging_bytes: int = 256 * 2**20
    # Blocks that wait for the block store stay on the device.
    max_writeback_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        for name in (
            "resume_every_blocks",
            "idle_seconds",
            "load_timeout_seconds",
            "load_patience_seconds",
            "staging_bytes",
            "max_writeback_bytes",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


class KvCache:
    """Lives on the engine's loop; `running` does what is done beside requests."""

    def __init__(
        self,
        pool: KVPool,
        store: BlockStore | None,
        config: KvCacheConfig,
        *,
        model_digest: bytes = bytes(DIGEST_BYTES),
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when a claim became ready or loaded, and when there is room."""
        self.pool = pool
        self.counters = KvCounters()
        self.costs = CostModel(
            block_tokens=pool.layout.block_tokens,
            body_nbytes=pool.body_nbytes,
            tail_nbytes=pool.tail_nbytes,
        )
        self._config = config
        self._model_digest = model_digest
        self._on_change = on_change
        self._tails = TailCache(_num_tails(pool, config), pool.tail_nbytes)
        self._write_back = (
            WriteBack(
                store,
                pool,
                self._tails,
                self.counters,
                max_bytes=config.max_writeback_bytes,
                on_room=on_change,
            )
            if store is not None
            else None
        )
        self._parts = RequestKvParts(
            history=HistoryParts(
                pool=pool,
                tails=self._tails,
                write_back=self._write_back,
                counters=self.counters,
                resume_every_blocks=config.resume_every_blocks,
            ),
            restore=RestoreParts(
                store=store,
                tails=self._tails,
                costs=self.costs,
                min_patience_s=config.load_patience_seconds,
                load_timeout_s=config.load_timeout_seconds,
            ),
            spawn=self._spawn,
            on_change=on_change,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, request: GenerationRequest) -> RequestKv:
        """The claim of a new request; starts to look for what need not be computed."""
        salt = request.cache_salt
        root = root_key(self._model_digest, self.pool.layout_digest, salt)
        return RequestKv(request, root, self._parts)

    def forget(self, keys: Sequence[bytes]) -> int:
        """Give the memory of these bodies and tails back unless a request holds them.

        Returns how many blocks of the device became free.
        """
        num_blocks = self.pool.forget(keys)
        self._tails.forget(keys)
        self._on_change()
        return num_blocks

    def stats(self) -> KvStats:
        usage = self.pool.usage()
        return KvStats(
            counters=copy.deepcopy(self.counters),
            held_blocks=usage.blocks,
            cached_blocks=usage.cached_blocks,
            max_blocks=usage.max_blocks,
            pool_bytes=usage.num_bytes,
            waiting_blobs=self._write_back.num_waiting if self._write_back else 0,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While inside, write-back goes on and idle blocks are forgotten.

        Every request must have given its KV back when this is left. What then waits to be written
        back is given a last while.
        """
        async with asyncio.TaskGroup() as tasks:
            upkeep = [tasks.create_task(self._forget_idle())]
            if self._write_back is not None:
                upkeep.append(tasks.create_task(self._write_back.run()))
            try:
                yield
            finally:
                await self._settle()
                for task in upkeep:
                    task.cancel()

    def check(self, num_running: int) -> None:
        """Assert that every block, slot and tail is accounted for. Not while a step runs."""
        self.pool.check()
        self._tails.check()
        # Those who left while something was being loaded into their blocks give them back after.
        assert num_running <= self.pool.usage().sequences <= num_running + len(self._tasks)

    async def _settle(self) -> None:
        while self._tasks:  # of requests that have ended
            await asyncio.wait(self._tasks)
        if self._write_back is None:
            return
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self._write_back.flush()
        except TimeoutError:
            log.warning("write_back_cut_short seconds=%g", FLUSH_TIMEOUT_S)

    def _spawn(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._work_ended)
        return task

    def _work_ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._on_change()

    async def _forget_idle(self) -> None:
        while True:
            await asyncio.sleep(self._config.idle_seconds / 4)
            if self.pool.forget_idle(self._config.idle_seconds):
                self._on_change()


def _num_tails(pool: KVPool, config: KvCacheConfig) -> int:
    """As many as fit; more than one for each block on the device could not be used."""
    usage = pool.usage()
    fitting = config.staging_bytes // pool.tail_nbytes
    if fitting < usage.max_sequences:
        log.warning(
            "staging_too_small tails=%d max_sequences=%d staging_bytes=%d tail_bytes=%d",
            fitting,
            usage.max_sequences,
            config.staging_bytes,
            pool.tail_nbytes,
        )
    return max(2, min(fitting, usage.max_blocks + 2 * usage.max_sequences))
