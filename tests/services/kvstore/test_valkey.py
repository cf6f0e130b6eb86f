import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.kvstore import valkey as valkey_module
from services.kvstore.redis_link import RedisConfig, RedisDown, RedisLink
from services.kvstore.valkey import LOG_NAME, EmbeddedValkey, ValkeyUnavailable

_OWNER = """
import sys, time
from pathlib import Path
from services.kvstore.valkey import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]), max_bytes=1 << 20)
print(server.pid, flush=True)
time.sleep(60)
"""


def _eventually(holds: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_only_who_has_the_password_is_let_in(valkey: EmbeddedValkey) -> None:
    with socket.create_connection((valkey.host, valkey.port), timeout=5.0) as stranger:
        stranger.sendall(b"GET x\r\n")
        assert stranger.recv(100).startswith(b"-NOAUTH")
    link = RedisLink(RedisConfig(valkey.url, valkey.password, timeout_seconds=10.0))
    assert link.call("PING", writes=False) in (b"PONG", True)
    link.close()


def test_the_password_is_nowhere_that_others_can_read(own_valkey: EmbeddedValkey) -> None:
    password = own_valkey.password.encode()
    assert own_valkey.pid is not None
    for pid in (own_valkey.pid, os.getpid()):
        for name in ("cmdline", "environ"):
            assert password not in Path(f"/proc/{pid}/{name}").read_bytes()
    directory = own_valkey._directory
    assert [path.name for path in directory.iterdir()] == [LOG_NAME]
    assert password not in (directory / LOG_NAME).read_bytes()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / LOG_NAME).stat().st_mode) == 0o600
    assert own_valkey.password not in repr(RedisConfig(own_valkey.url, own_valkey.password))


def test_it_keeps_to_its_memory_and_to_no_disk(own_valkey: EmbeddedValkey) -> None:
    link = RedisLink(RedisConfig(own_valkey.url, own_valkey.password, timeout_seconds=10.0))
    settings: dict[str, str] = {}
    for name in ("maxmemory", "maxmemory-policy", "save", "appendonly"):
        settings |= link.call("CONFIG GET", name, writes=False)
    assert settings == {
        "maxmemory": str(96 << 20),
        "maxmemory-policy": "allkeys-lru",
        "save": "",
        "appendonly": "no",
    }
    link.close()


def test_a_server_that_is_killed_is_started_again_at_the_same_place(
    own_valkey: EmbeddedValkey,
) -> None:
    config = RedisConfig(
        own_valkey.url, own_valkey.password, timeout_seconds=10.0, probe_seconds=0.1
    )
    link = RedisLink(config)
    first = own_valkey.pid
    assert first is not None
    link.call("SET", "key", b"value", writes=True)
    os.kill(first, signal.SIGKILL)
    _eventually(lambda: not _is_alive(first))
    with pytest.raises(RedisDown, match="cannot be reached"):
        link.call("GET", "key", writes=False)

    def works_again() -> bool:
        link.tick()
        return link.degraded is None

    _eventually(works_again)
    _eventually(lambda: own_valkey.pid not in (None, first))  # it answers a moment earlier
    assert link.call("GET", "key", writes=False) is None
    link.close()


def test_stop_ends_the_server_and_does_so_once(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path, max_bytes=1 << 20)
    pid = server.pid
    assert pid is not None
    server.stop()
    assert not _is_alive(pid)
    assert server.pid is None
    server.stop()


def test_it_dies_with_its_owner(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert _is_alive(pid)
        owner.send_signal(signal.SIGKILL)
    _eventually(lambda: not _is_alive(pid))


def test_a_port_that_is_taken_is_an_error_that_names_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(ValkeyUnavailable, match=f"127.0.0.1:{port}"):
            EmbeddedValkey(tmp_path, max_bytes=1 << 20, port=port)


def test_a_directory_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValkeyUnavailable, match="cannot start an embedded Valkey"):
        EmbeddedValkey(tmp_path / "file", max_bytes=1 << 20)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).mkdir()
    with pytest.raises(ValkeyUnavailable, match="did not come up"):
        EmbeddedValkey(tmp_path, max_bytes=1 << 20)


def test_a_server_that_cannot_be_started_again_is_tried_until_it_can(
    own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey_module, "RESTART_DELAY_SECONDS", 0.05)
    first, log_file = own_valkey.pid, own_valkey._directory / LOG_NAME
    assert first is not None
    log_file.unlink()
    log_file.mkdir()
    os.kill(first, signal.SIGKILL)
    _eventually(lambda: own_valkey.pid is None)
    time.sleep(0.3)
    log_file.rmdir()
    _eventually(lambda: own_valkey.pid not in (None, first))
