"""`model1 chat` at a terminal: a pseudo-terminal on one side, a real deployment on the other."""

import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.command import MODEL1, ROOT, run_json, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_SECONDS = 30


class Terminal:
    """Whoever sits at it."""

    def __init__(self, process: "subprocess.Popen[bytes]", descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._seen = ""

    def types(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def sees(self, text: str) -> None:
        """From what was seen last on."""
        self._read_until(lambda: text in self._seen, repr(text))
        self._seen = self._seen.partition(text)[2]

    def sees_some(self, num_characters: int) -> None:
        self._read_until(lambda: len(self._seen) >= num_characters, f"{num_characters} characters")

    def leaves(self) -> None:
        """By Ctrl-D, at the prompt: the terminal loses one that it gets while its mode changes."""
        self.sees("> ")
        self.types("\x04")
        assert self.process.wait(PATIENCE_SECONDS) == 0

    def _read_until(self, is_enough: Callable[[], bool], wanted: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_enough():
            assert time.monotonic() < deadline, f"no {wanted} in {self._seen!r}"
            try:
                self._seen += os.read(self._descriptor, 4096).decode(errors="replace")
            except OSError:  # the other end was closed
                assert is_enough(), f"no {wanted} in {self._seen!r}"


@contextmanager
def at_a_terminal(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*MODEL1, "chat", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_chat_goes_on_after_an_answer_that_was_cut_short(tiny_checkpoint: Path) -> None:
    with served("--model", tiny_checkpoint) as deployment:
        at = ("--endpoint", deployment.endpoint)
        with at_a_terminal("--session", "talk", *at, "--max-tokens", "5") as terminal:
            terminal.sees("> ")
            terminal.types("Hello\n")
            terminal.sees("prompt 6 tokens, answer 5 tokens")
            terminal.sees("> ")
            terminal.types("x" * 395 + "\n")
            terminal.sees("model1: the prompt has 395 tokens after 11 of the session")
            terminal.sees("> ")
            terminal.types("again\n")
            terminal.sees("prompt 16 tokens, answer 5 tokens")
            terminal.leaves()
        with at_a_terminal("--session", "long", *at, "--max-tokens", "380") as terminal:
            terminal.sees("> ")
            terminal.types("Hello\n")
            terminal.sees("\n")
            terminal.sees_some(40)  # of the 380 tokens of the answer
            os.killpg(terminal.process.pid, signal.SIGINT)  # Ctrl-C
            terminal.leaves()
        with at_a_terminal(*at, "--max-tokens", "2") as terminal:
            terminal.sees("> ")
            terminal.types("Hello\n")
            terminal.sees("answer 2 tokens")
            terminal.leaves()
        sessions = run_json("session", "list", *at)["sessions"]
        assert [each["session_id"] for each in sessions] == ["talk"]
        assert deployment.stop().code == 0
