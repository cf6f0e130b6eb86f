"""The folder of a Ray of our own: private, and removed even when its owner could not."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.runtime_dir import LENGTH, MIN_ABANDONED_SECONDS, remove_abandoned, runtime_dir

ROOT = Path(__file__).parents[2]


def _age(private: Path) -> None:
    long_ago = time.time() - 2 * MIN_ABANDONED_SECONDS
    os.utime(private / "lock", (long_ago, long_ago))


def test_nobody_else_can_enter_it_though_ray_opens_it_to_everybody(tmp_path: Path) -> None:
    with runtime_dir(tmp_path) as folder:
        folder.chmod(0o777)
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert len(str(folder)) == len(str(tmp_path)) + LENGTH
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from cluster.runtime_dir import runtime_dir\n"
        "with runtime_dir(Path(sys.argv[1])) as folder: print(folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout
        private = Path(command.stdout.readline().strip()).parent
        remove_abandoned(tmp_path)
        assert private.is_dir()  # it runs
        os.kill(command.pid, signal.SIGKILL)
        command.wait()
        with runtime_dir(tmp_path) as folder:
            assert list(tmp_path.iterdir()) == [folder.parent]


def test_what_a_late_writer_keeps_from_going_is_removed_by_a_later_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as writer:
        with runtime_dir(tmp_path) as folder:
            (folder / "log").touch()
            writer.setattr("os.rmdir", _refuse)  # as for a folder that is not empty any more
        assert folder.is_dir()
    _age(folder.parent)
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def _refuse(path: str, **_: object) -> None:
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)


def test_a_folder_that_is_new_or_not_ours_is_left_alone(tmp_path: Path) -> None:
    new, foreign, target = (tmp_path / name for name in ("model1-new", "model1-foreign", "target"))
    for folder in (new, foreign, target):
        folder.mkdir()
    for folder in (new, target):
        (folder / "lock").touch()
    _age(target)
    (tmp_path / "model1-link").symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
