"""Sessions as a gateway serves them: one turn at a time, each going on from the record of the last.

A turn is recorded when its answer is complete, before the client is told; one that ends otherwise
leaves the session as it was. Knows neither gRPC nor where records are kept.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from model1.errors import InvalidRequest
from services.errors import SessionBusy, SessionLost
from services.gateway.stores import StoreSet
from services.generation import MAX_CACHE_SALT_LENGTH, MAX_SESSION_ID_LENGTH
from services.kv_keys import KeyChain, root_key
from services.session_record import SessionHead, SessionName, SessionRecord

log = logging.getLogger(__name__)

# Of the last sessions, whose records this gateway knows there must be.
MAX_REMEMBERED_SESSIONS = 65_536


class Turn:
    """A turn under way: what was said before, and the way to record what is said now."""

    def __init__(
        self,
        name: SessionName,
        record: SessionRecord | None,
        stores: StoreSet,
        clock: Callable[[], float],
        kept: Callable[[SessionHead], None],
    ) -> None:
        """`kept` is called with what was recorded."""
        self._name = name
        self._kept = kept
        self._record = record
        self._stores = stores
        self._clock = clock
        self._saving: asyncio.Task[None] | None = None

    @property
    def history(self) -> tuple[int, ...]:
        return self._record.token_ids if self._record else ()

    @property
    def last_worker(self) -> str:
        return self._record.head.worker if self._record else ""

    async def keep(self, token_ids: tuple[int, ...], *, kv_root: bytes, worker: str) -> None:
        """Record the history as it is now. Goes on by itself if its caller is cancelled; raises
        `SessionChanged` or `Unavailable`."""
        assert self._saving is None, "a turn is recorded once"
        now_s = self._clock()
        before = self._record.head if self._record else None
        head = SessionHead(
            name=self._name,
            version=before.version + 1 if before else 1,
            num_tokens=len(token_ids),
            kv_root=kv_root,
            created_s=before.created_s if before and not before.is_deleted else now_s,
            last_used_s=now_s,
            pinned_until_s=before.pinned_until_s if before else 0.0,
            worker=worker,
        )
        self._saving = asyncio.create_task(self._save(SessionRecord(head, token_ids)))
        await asyncio.shield(self._saving)

    async def _save(self, record: SessionRecord) -> None:
        head = record.head
        await self._stores.save(record, head.version - 1)
        self._kept(head)
        if head.pinned_until_s > head.last_used_s:
            # Its new blocks too; and stores that were restarted have forgotten the old ones.
            await self._stores.pin(blob_keys(record), head.pinned_until_s)

    async def settle(self) -> None:
        """Wait for a record that is being written."""
        if self._saving is not None and not self._saving.done():
            await asyncio.wait([self._saving])
            if error := self._saving.exception():
                log.warning("turn_lost session_id=%r why=%s", self._name.session_id, error)


class Sessions:
    """Owns which sessions are in a turn at this gateway."""

    def __init__(self, stores: StoreSet, clock: Callable[[], float] = time.time) -> None:
        self.stores = stores
        self._clock = clock
        self._in_use: set[SessionName] = set()
        self._versions: OrderedDict[SessionName, int] = OrderedDict()  # seen, last used last

    @asynccontextmanager
    async def turn(self, name: SessionName) -> AsyncIterator[Turn]:
        """Raises `SessionBusy` while another turn is under way, and `SessionLost`, once, if the
        stores have forgotten what this gateway saw in them: an answer without the history would
        look like any other."""
        with self.claimed(name):
            record = await self.stores.load(name)
            self._expect_no_less(name, record)
            turn = Turn(name, record, self.stores, self._clock, self._saw)
            try:
                yield turn
            finally:
                await turn.settle()

    def _expect_no_less(self, name: SessionName, record: SessionRecord | None) -> None:
        known = self._versions.pop(name, 0)
        found = record.head.version if record is not None else 0
        if found < known:
            raise SessionLost(
                f"session {name.session_id!r} was at version {known}, and its record is "
                f"{'gone' if record is None else f'at version {found}'}: a KV store that had it "
                "was lost. The next turn goes on from what there is"
            )
        if record is not None:
            self._saw(record.head)

    def _saw(self, head: SessionHead) -> None:
        self._versions[head.name] = head.version
        self._versions.move_to_end(head.name)
        if len(self._versions) > MAX_REMEMBERED_SESSIONS:
            self._versions.popitem(last=False)

    @contextmanager
    def claimed(self, name: SessionName) -> Iterator[None]:
        """Nobody else writes the session through this gateway meanwhile."""
        check_name(name)
        if name in self._in_use:
            raise SessionBusy(
                f"session {name.session_id!r} is in use: it takes one turn or change at a time"
            )
        self._in_use.add(name)
        try:
            yield
        finally:
            self._in_use.remove(name)

    def is_in_use(self, name: SessionName) -> bool:
        return name in self._in_use


def key_chain(record: SessionRecord) -> KeyChain:
    """What the blobs of the session are called; empty if no worker has told yet how they begin."""
    chain = KeyChain(record.head.kv_root or root_key(b"", b""))
    if record.head.kv_root:
        chain.extend(record.token_ids)
    return chain


def blob_keys(record: SessionRecord) -> list[bytes]:
    """Of every block, and of whatever is needed to resume at any boundary."""
    chain = key_chain(record)
    boundaries = range(1, len(chain.body_keys) + 1)
    return [*chain.body_keys, *(chain.tail_key(boundary) for boundary in boundaries)]


def check_name(name: SessionName) -> None:
    """Raises InvalidRequest."""
    if not 0 < len(name.session_id) <= MAX_SESSION_ID_LENGTH:
        raise InvalidRequest(
            f"session_id must have 1 to {MAX_SESSION_ID_LENGTH} characters, "
            f"not {len(name.session_id)}"
        )
    if not name.session_id.isprintable():  # it stands in log lines
        raise InvalidRequest(f"session_id {name.session_id!r} has unprintable characters")
    if len(name.cache_salt) > MAX_CACHE_SALT_LENGTH:
        raise InvalidRequest(
            f"cache_salt must have at most {MAX_CACHE_SALT_LENGTH} characters, "
            f"not {len(name.cache_salt)}"
        )
