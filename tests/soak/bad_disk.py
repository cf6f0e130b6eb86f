"""Real file systems that can be made to fail: full, read-only, or with errors from the device.

They are mounted, which only root may; `can_mount` tells.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def can_mount() -> bool:
    """Whether this process may mount a file system and attach a loop device."""
    tools = ("mount", "umount", "losetup", "mkfs.ext4")
    return os.geteuid() == 0 and all(map(shutil.which, tools)) and _may_mount()


def _may_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    has_loop = Path("/dev/loop-control").exists()
    return has_loop and subprocess.run(probe, capture_output=True).returncode == 0


class SmallDisk:
    """A file system in memory of a fixed size."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Take all the room that is left."""
        with (
            (self.path / "ballast").open("wb", buffering=0) as ballast,
            contextlib.suppress(OSError),
        ):
            while ballast.write(bytes(1 << 16)):
                pass

    def empty(self) -> None:
        (self.path / "ballast").unlink()

    def set_writable(self, writable: bool) -> None:
        _run("mount", "-o", f"remount,{'rw' if writable else 'ro'}", self.path)


@contextlib.contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[SmallDisk]:
    directory.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", directory)
    try:
        yield SmallDisk(directory)
    finally:
        _run("umount", "--lazy", directory)


class FailingDisk:
    """ext4 on a loop device whose medium can lose its sectors: reading them is EIO."""

    def __init__(self, path: Path, medium: Path) -> None:
        self.path = path
        self._medium = medium
        self._num_bytes = medium.stat().st_size

    def fail(self) -> None:
        """Whatever is read from the medium from now on is EIO, and nothing is in memory."""
        _run("sync", "-f", self.path)
        shutil.copyfile(self._medium, self._saved)
        for file in self.path.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        os.truncate(self._medium, 0)

    def heal(self) -> None:
        """The sectors are back, as they were."""
        with self._saved.open("rb") as source, self._medium.open("r+b") as medium:
            shutil.copyfileobj(source, medium)
            medium.truncate(self._num_bytes)

    @property
    def _saved(self) -> Path:
        return self._medium.with_suffix(".saved")


@contextlib.contextmanager
def failing_disk(directory: Path, num_bytes: int) -> Iterator[FailingDisk]:
    path, medium = directory / "mounted", directory / "medium"
    path.mkdir(parents=True)
    medium.touch()
    os.truncate(medium, num_bytes)
    _run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard", medium)
    loop = _run("losetup", "--find", "--show", medium)
    try:
        _run("mount", loop, path)
        try:
            yield FailingDisk(path, medium)
        finally:
            _run("umount", "--lazy", path)
    finally:
        _run("losetup", "--detach", loop)


def _run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
