"""The attention workers a gateway can use, and which one takes the next request.

The table is replaced as a whole by whoever knows the deployment. Knows nothing of clients.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence

from services.errors import WorkerUnavailable
from services.gateway.placement import Candidate, KnownPrefixes, choose
from services.gateway.watched_worker import SilenceLimits, WatchedWorker
from services.gateway.worker import Worker, WorkerAddress
from services.generation import GenerationRequest
from services.tls import Tls

log = logging.getLogger(__name__)


class WorkerPool:
    """Owner of the channels to all workers of the table."""

    def __init__(self, silence: SilenceLimits, tls: Tls | None = None) -> None:
        self._silence = silence
        self._tls = tls
        self._workers: dict[WorkerAddress, WatchedWorker] = {}
        self._known: KnownPrefixes[WorkerAddress] = KnownPrefixes()
        self._change = asyncio.Event()

    @property
    def all(self) -> tuple[Worker, ...]:
        return tuple(each.worker for each in self._workers.values())

    @property
    def table(self) -> tuple[WorkerAddress, ...]:
        return tuple(self._workers)

    async def update(self, table: Iterable[WorkerAddress], lost: Collection[str] = ()) -> None:
        """Use exactly these workers from now on; requests on the others finish there, unless the
        worker at this address is lost: then they end as unavailable."""
        rows = tuple(table)
        gone = [each for row, each in self._workers.items() if row not in rows]
        self._workers = {row: self._workers.get(row) or self._watched(row) for row in rows}
        self._changed()
        for each in gone:
            if each.worker.row.address in lost:
                each.worker.give_up("its process or its node is lost")
        await asyncio.gather(*(each.retire() for each in gone))

    def choose(
        self,
        request: GenerationRequest,
        *,
        last_worker: str = "",
        passed_over: Collection[WorkerAddress] = (),
    ) -> WatchedWorker | None:
        """Who takes the request now; `last_worker` served the turn before. None: nobody can."""
        able = [
            each
            for row, each in self._workers.items()
            if not each.is_away and row not in passed_over
        ]
        if not able:
            return None
        known = self._known.worker_of_longest(request.cache_salt, request.token_ids)
        candidates = [
            Candidate(
                num_active=each.num_active,
                looks_down=each.is_avoided,
                served_last_turn=each.worker.row.name == last_worker,
                knows_prefix=each.worker.row == known,
            )
            for each in able
        ]
        return able[choose(candidates)]

    def why_nobody(self) -> WorkerUnavailable:
        """What is to be said where `choose` finds nobody."""
        away = [row.name for row, each in self._workers.items() if each.is_away]
        if away:
            return WorkerUnavailable(f"no attention worker answers: {', '.join(away)}")
        return WorkerUnavailable("no attention worker is ready")

    async def wait_for_change(self) -> None:
        """Until the table is another one, or a worker that was away is back."""
        await self._change.wait()

    def store_of(self, worker_name: str) -> str:
        """Name of the KV store of that worker's node; empty if it is not known."""
        stores = (row.store for row in self._workers if row.name == worker_name)
        return next(stores, "")

    def learn(self, row: WorkerAddress, cache_salt: str, token_ids: Sequence[int]) -> None:
        """The worker has the KV of these tokens now."""
        self._known.learn(cache_salt, token_ids, row)

    async def release(self, keys: Sequence[bytes]) -> int:
        """Give the device memory of these blocks back everywhere; how many were held.

        A worker that does not answer is passed over: what it holds goes with it, or by age.
        """
        answers = await asyncio.gather(
            *(worker.release(keys) for worker in self.all), return_exceptions=True
        )
        blocks = 0
        for answer in answers:
            if isinstance(answer, int):
                blocks += answer
            elif isinstance(answer, WorkerUnavailable):
                log.warning("release_failed why=%s", answer)
            else:
                raise answer
        return blocks

    async def close(self) -> None:
        """Call off what is still active and close every channel."""
        workers = list(self._workers.values())
        self._workers = {}
        await asyncio.gather(*(each.close() for each in workers))

    def _watched(self, row: WorkerAddress) -> WatchedWorker:
        return WatchedWorker(
            Worker(row, self._tls),
            self._silence,
            on_return=self._changed,
            has_other=self._has_other,
        )

    def _has_other(self, worker: WatchedWorker) -> bool:
        return any(each is not worker and not each.is_away for each in self._workers.values())

    def _changed(self) -> None:
        self._change.set()  # whoever waits; the next ones wait for the next change
        self._change = asyncio.Event()
