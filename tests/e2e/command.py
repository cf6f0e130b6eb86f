"""The installed command as a user runs it: in a process of its own."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MODEL1 = (sys.executable, "-m", "cluster.main")
ROOT = Path(__file__).parents[2]
# Generous: several seconds of imports in seven processes, on a machine that may do other things.
START_TIMEOUT_SECONDS = 120
STOP_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


def run(
    *arguments: str | Path, stdin: str = "", timeout_seconds: float = START_TIMEOUT_SECONDS
) -> Result:
    done = subprocess.run(
        [*MODEL1, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_seconds,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_json(*arguments: str | Path, timeout_seconds: float = START_TIMEOUT_SECONDS) -> Any:
    result = run(*arguments, "--format", "json", timeout_seconds=timeout_seconds)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


class Served:
    """A `model1 serve` that has said that it is ready."""

    def __init__(self, process: "subprocess.Popen[str]", endpoint: str, stderr: IO[str]) -> None:
        self.process = process
        self.endpoint = endpoint
        self._stderr = stderr

    def members(self) -> list[dict[str, Any]]:
        status = run_json("status", "--endpoint", self.endpoint)
        members: list[dict[str, Any]] = status["topology"]["members"]
        return members

    def stop(self, number: signal.Signals = signal.SIGTERM) -> Result:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> Result:
        assert self.process.stdout is not None
        stdout = self.process.stdout.read()
        code = self.process.wait(STOP_TIMEOUT_SECONDS)
        self._stderr.seek(0)
        return Result(code, stdout, self._stderr.read())


def wait_until_gone(pids: list[int], timeout_seconds: float = 30) -> None:
    """Raises AssertionError if a process outlives the time."""
    deadline = time.monotonic() + timeout_seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.05)


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def process_tree(root: int) -> list[int]:
    """The process and all that it started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it has just ended
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    tree = [root]
    for pid in tree:  # grows meanwhile
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def commands(pids: Sequence[int]) -> set[str]:
    """The names of what these processes run; those that have ended are left out."""
    names = set()
    for pid in pids:
        try:
            # Some servers write one string over their arguments, with more behind the name.
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").split()
        except OSError:
            continue
        names |= {Path(word.decode()).name for word in words[:1]}
    return names


@contextmanager
def served(*flags: str | Path) -> Iterator[Served]:
    """`model1 serve` on a free port; killed at the end if the test has not stopped it."""
    # A file rather than a pipe, so that nothing blocks however much is written.
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*MODEL1, "serve", "--port", "0", *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("ready grpc="):
                process.wait(STOP_TIMEOUT_SECONDS)
                stderr.seek(0)
                raise AssertionError(f"no ready line but {line!r}; {stderr.read()}")
            yield Served(process, line.strip().removeprefix("ready grpc="), stderr)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()
