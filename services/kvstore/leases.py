"""Owns which spans of the arena the workers' threads may touch: leases, by client and by stream.

A lease of a stream that broke does not end with the stream: a worker that was frozen or cut off
may be in the middle of a copy, and a span given to somebody else meanwhile would become wrong
tokens. It ends when the worker says hello again, or when it is dead, which is when the lock on its
client file is free. Knows no messages.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
from pathlib import Path

from services.kvstore.ram import RamTier, Reservation, Resident

CLIENT_SUFFIX = ".client"
_CLIENT_ID = re.compile(r"[0-9a-f]{32}")


def client_path(arena_path: Path, client_id: str) -> Path:
    """The file that the client holds a lock on while it lives."""
    return arena_path.parent / f"{client_id}{CLIENT_SUFFIX}"


class Holder:
    """One stream of a client, and what was leased to it."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.connected = True
        self.leases: dict[int, Resident | Reservation] = {}


class LeaseBook:
    def __init__(self, ram: RamTier) -> None:
        self._ram = ram
        self._holders: list[Holder] = []
        self._ids = itertools.count(1)

    @property
    def num_leases(self) -> int:
        return sum(len(holder.leases) for holder in self._holders)

    @property
    def num_clients(self) -> int:
        return sum(1 for holder in self._holders if holder.connected)

    def connect(self, client_id: str) -> Holder:
        """A new stream of a client, which touches nothing of its earlier ones: their leases end.

        Raises ValueError for an id that is no file name of ours.
        """
        if not _CLIENT_ID.fullmatch(client_id):
            raise ValueError(f"a client id is 32 hex digits, not {client_id[:64]!r}")
        for earlier in [each for each in self._holders if each.client_id == client_id]:
            earlier.connected = False
            self._end(earlier)
        holder = Holder(client_id)
        self._holders.append(holder)
        return holder

    def disconnect(self, holder: Holder) -> None:
        """The stream is over; what it held stays until the client's next word or its death."""
        holder.connected = False
        if holder in self._holders and (not holder.leases or self._is_dead(holder.client_id)):
            self._end(holder)

    def grant(self, holder: Holder, leased: Resident | Reservation) -> int | None:
        """The holder takes over the caller's use of a blob, or its reservation.

        None if the stream has been followed by another one: then the lease has ended already.
        """
        if not holder.connected:
            self._let_go(leased)
            return None
        lease = next(self._ids)
        holder.leases[lease] = leased
        return lease

    def release(self, holder: Holder, lease: int) -> None:
        """End a lease: a use ends, a reservation is abandoned. Unknown ones have ended already."""
        if (leased := holder.leases.pop(lease, None)) is not None:
            self._let_go(leased)

    def take(self, holder: Holder, lease: int) -> Resident | Reservation | None:
        """As `release`, but what was leased is the caller's now."""
        return holder.leases.pop(lease, None)

    def end_those_of_the_dead(self) -> int:
        """Call it about once a second; returns how many leases ended."""
        dead = [
            holder
            for holder in self._holders
            if not holder.connected and self._is_dead(holder.client_id)
        ]
        num_leases = sum(len(holder.leases) for holder in dead)
        for holder in dead:
            self._end(holder)
        return num_leases

    def close(self) -> None:
        """The arena goes as well: the workers' mappings outlive it, and nobody reuses a span."""
        for holder in list(self._holders):
            self._end(holder)

    def _end(self, holder: Holder) -> None:
        self._holders.remove(holder)
        for lease in list(holder.leases):
            self.release(holder, lease)

    def _let_go(self, leased: Resident | Reservation) -> None:
        if isinstance(leased, Resident):
            self._ram.let_go(leased)
        else:
            self._ram.abandon(leased)

    def _is_dead(self, client_id: str) -> bool:
        return _remove_if_dead(client_path(self._ram.arena.path, client_id))


def remove_dead_clients(directory: Path) -> None:
    """Remove the files of clients that were killed."""
    for path in directory.glob(f"*{CLIENT_SUFFIX}"):
        _remove_if_dead(path)


def _remove_if_dead(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True  # a client locks its file before it asks for anything
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


class ClientLock:
    """The client's end: says that the client lives, until `close` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the arena's folder cannot be written."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def holds(self, path: Path) -> bool:
        """Whether the lock is on the file that has this path now."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except OSError:
            return False

    def close(self) -> None:
        if self.holds(self._path):
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
