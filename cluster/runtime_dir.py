"""Owns the folder of a Ray of our own: private to its user, and gone afterwards.

A command that was killed leaves its folder behind; the next one of the same user removes it. Knows
nothing of Ray but its habit of opening folders to everybody.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "model1-"
# Below the parent: "/model1-", eight characters of mkdtemp's, "/r".
LENGTH = 18
# A folder younger than this may belong to a command that has yet to lock it. Once it was locked it
# has no age, and what a process of this moment left can go at once.
MIN_ABANDONED_SECONDS = 60.0


@contextmanager
def runtime_dir(parent: Path) -> Iterator[Path]:
    """A new folder below `parent`; it and whatever is in it is removed on the way out."""
    remove_abandoned(parent)
    private = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (private / "lock").open("w") as lock:  # held until this process ends, however it does
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.utime(lock.fileno(), (0, 0))
            # Ray makes the folder that it is given 0777; the one around it stays 0700.
            folder = private / "r"
            folder.mkdir()
            yield folder
    finally:
        _remove(private)


def remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose commands have ended without doing so."""
    for private in parent.glob(f"{PREFIX}*"):
        # Somebody else's, in use, or removed by another command just now: not ours to remove.
        with suppress(OSError):
            found = private.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with (private / "lock").open() as lock:
                if time.time() - os.fstat(lock.fileno()).st_mtime < MIN_ABANDONED_SECONDS:
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(private)


def _remove(private: Path) -> None:
    """Its lock goes last: a process of Ray that still writes may keep the rest from going, and then
    the next command finds by the lock that the folder is one of these, and whose."""
    shutil.rmtree(private / "r", ignore_errors=True)
    if not (private / "r").exists():
        shutil.rmtree(private, ignore_errors=True)
