"""A Redis that fails in each way that a real one does: a real Valkey that is ill-treated."""

import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from services.kvstore.cold import ColdTier
from services.kvstore.cold_records import ColdRecords
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.sample_blobs import sample_blob, sample_key
from tests.services.kvstore.tcp_proxy import TcpProxy

PAYLOAD = 1000
BLOB = len(sample_blob(0, PAYLOAD))
TIMEOUT_SECONDS = 1.0


class Cold:
    """A tier and records over a link of their own; asked of as a store does."""

    def __init__(self, url: str, password: str | None, **changes: object) -> None:
        settings = {"timeout_seconds": TIMEOUT_SECONDS, "slow_seconds": 60.0} | changes
        config = RedisConfig(url, password, probe_seconds=0.05, **settings)  # type: ignore[arg-type]
        self.link = RedisLink(config)
        self.tier = ColdTier(self.link, max_bytes=1 << 30, ttl_seconds=1000.0)
        self.records = ColdRecords(self.link, ttl_seconds=1000.0)

    def close(self) -> None:
        self.link.close()

    def put(self, number: int) -> bool:
        return self.tier.put(sample_key(number), sample_blob(number, PAYLOAD))

    def has(self, number: int) -> bool:
        out = memoryview(bytearray(BLOB))
        if self.tier.get_into(sample_key(number), lambda num_bytes: out) is None:
            return False
        assert out == sample_blob(number, PAYLOAD)
        return True

    def is_without_hits(self) -> bool:
        """No answer is waited for, and nothing it answers is an error."""
        started = time.monotonic()
        found = self.has(0) or self.put(99) or any(self.tier.contains([sample_key(0)]))
        found = found or self.records.get_record("a") is not None
        found = found or self.records.put_record("a", b"", 0, 1) or bool(self.tier.keys())
        self.tier.evict(1)
        self.tier.delete([sample_key(0)])
        return not found and time.monotonic() - started < 0.9 * TIMEOUT_SECONDS

    def comes_back(self) -> bool:
        deadline = time.monotonic() + 20
        while self.tier.degraded is not None and time.monotonic() < deadline:
            self.tier.tick()
            time.sleep(0.02)
        return self.tier.degraded is None


@pytest.fixture
def cold(own_valkey: EmbeddedValkey) -> Iterator[Cold]:
    with closing(Cold(own_valkey.url, own_valkey.password)) as cold:
        assert cold.put(0)
        yield cold


@pytest.fixture
def admin(own_valkey: EmbeddedValkey) -> Iterator[Callable[..., object]]:
    """Runs commands on the server, whatever it thinks of others."""
    link = RedisLink(RedisConfig(own_valkey.url, own_valkey.password, timeout_seconds=10.0))

    def run(*command: str | int) -> object:
        return link.call(*command, writes=False)

    run("PING")  # connected before anything is forbidden
    yield run
    link.close()


def test_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    with closing(Cold("redis://127.0.0.1:1", None)) as cold:
        assert cold.tier.degraded is None  # nobody has asked
        assert not cold.has(0)
        assert cold.tier.degraded is not None
        assert cold.tier.degraded.startswith("cannot be reached")
        assert cold.is_without_hits()


def test_a_server_that_is_killed(own_valkey: EmbeddedValkey, cold: Cold) -> None:
    assert own_valkey.pid is not None
    os.kill(own_valkey.pid, signal.SIGKILL)
    assert not cold.has(0)
    assert cold.is_without_hits()
    assert cold.comes_back()
    assert not cold.has(0)  # it has forgotten
    assert cold.put(0)
    assert cold.has(0)


def test_a_server_that_hangs(own_valkey: EmbeddedValkey, cold: Cold) -> None:
    assert own_valkey.pid is not None
    os.kill(own_valkey.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert not cold.has(0)
        assert time.monotonic() - started < 3 * TIMEOUT_SECONDS
        assert cold.tier.degraded == "no answer in 1 s"
        assert cold.is_without_hits()
        time.sleep(0.1)
        cold.tier.tick()  # the probe fails
        assert cold.tier.degraded is not None
    finally:
        os.kill(own_valkey.pid, signal.SIGCONT)
    assert cold.comes_back()
    assert cold.has(0)
    assert cold.tier.counts.failures["TimeoutError"] >= 2


def test_a_server_that_was_wiped(cold: Cold, admin: Callable[..., object]) -> None:
    assert cold.records.put_record("a", b"x", 0, 1)
    admin("FLUSHALL")
    assert not cold.has(0)
    assert cold.records.get_record("a") is None
    assert cold.tier.degraded is None
    assert cold.put(0)
    cold.tier.tick()
    assert (cold.tier.num_blobs, cold.tier.used_bytes) == (1, BLOB)


def test_a_server_that_is_slow(own_valkey: EmbeddedValkey) -> None:
    with (
        closing(TcpProxy(own_valkey.port)) as proxy,
        closing(
            Cold(f"redis://127.0.0.1:{proxy.port}", own_valkey.password, slow_seconds=0.3)
        ) as cold,
    ):
        assert cold.put(0)
        proxy.delay_seconds = 0.4
        for _ in range(4):
            cold.has(0)
        assert cold.tier.degraded is not None
        assert cold.tier.degraded.startswith("slow: ")
        assert cold.is_without_hits()
        time.sleep(0.1)
        cold.tier.tick()  # the probe is slow, too
        assert cold.tier.degraded is not None
        proxy.delay_seconds = 0.0
        assert cold.comes_back()
        assert cold.has(0)


def test_a_server_that_refuses_our_password(
    cold: Cold, admin: Callable[..., object], own_valkey: EmbeddedValkey
) -> None:
    admin("CONFIG SET", "requirepass", "changed")
    admin("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
    cold.has(0)  # the connection is gone
    time.sleep(0.1)
    cold.tier.tick()
    assert cold.tier.degraded is not None
    assert cold.tier.degraded.startswith("refuses our credentials")
    assert cold.is_without_hits()
    admin("CONFIG SET", "requirepass", own_valkey.password)
    assert cold.comes_back()
    assert cold.has(0)


def test_a_server_that_wants_a_password_that_we_do_not_have(own_valkey: EmbeddedValkey) -> None:
    with closing(Cold(own_valkey.url, None)) as cold:
        assert not cold.has(0)
        assert cold.tier.degraded is not None
        assert cold.tier.degraded.startswith("refuses our credentials")


def test_a_user_whose_rights_do_not_suffice(
    own_valkey: EmbeddedValkey, admin: Callable[..., object]
) -> None:
    admin("ACL SETUSER", "model1", "on", ">secret-of-model1", "~*", "+@all", "-set")
    url = f"redis://model1:secret-of-model1@{own_valkey.host}:{own_valkey.port}"
    with closing(Cold(url, None)) as cold:
        assert not cold.put(0)
        assert cold.tier.degraded is not None
        assert cold.tier.degraded.startswith("its ACL forbids what we need")
        admin("ACL SETUSER", "model1", "+@all")
        assert cold.comes_back()
        assert cold.put(0)


def test_the_rights_that_suffice_are_few(
    own_valkey: EmbeddedValkey, admin: Callable[..., object]
) -> None:
    """What the documentation tells operators to grant."""
    rights = "~model1:* ~{model1:* +@read +@write +@connection +@transaction -@dangerous"
    admin("ACL SETUSER", "model1", "on", ">secret", *rights.split())
    with closing(Cold(own_valkey.url.replace("//", "//model1:secret@"), None)) as cold:
        assert cold.put(0)
        assert cold.has(0)
        cold.tier.tick()
        assert cold.records.put_record("a", b"", 0, 1)
        assert cold.records.names() == ["a"]
        assert cold.tier.delete([sample_key(0)]) == 1
        assert cold.tier.degraded is None


def test_a_server_that_is_out_of_memory(cold: Cold, admin: Callable[..., object]) -> None:
    for number in range(1, 20):
        assert cold.put(number)
    admin("CONFIG SET", "maxmemory-policy", "noeviction", "maxmemory", 1)
    assert not cold.put(20)
    assert cold.tier.degraded == "out of memory"
    assert cold.has(19)
    assert not cold.put(20)
    assert not cold.records.put_record("a", b"", 0, 1)
    assert cold.tier.counts.evicted_blobs == 5  # a quarter makes way
    assert not cold.has(0)
    time.sleep(0.1)
    cold.tier.tick()
    assert cold.tier.degraded == "out of memory"
    admin("CONFIG SET", "maxmemory", 64 << 20)
    assert cold.comes_back()
    assert cold.put(20)
    assert cold.has(20)
    cold.tier.tick()
    assert cold.tier.used_bytes == cold.tier.num_blobs * BLOB


def test_a_server_that_became_a_replica(cold: Cold, admin: Callable[..., object]) -> None:
    admin("REPLICAOF", "127.0.0.1", 1)
    assert not cold.put(1)
    assert cold.tier.degraded == "read-only"
    assert cold.has(0)
    admin("REPLICAOF", "NO", "ONE")
    assert cold.comes_back()
    assert cold.put(1)


def test_no_secret_is_logged(
    cold: Cold,
    admin: Callable[..., object],
    own_valkey: EmbeddedValkey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    admin("CONFIG SET", "requirepass", "changed")
    admin("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
    url = f"redis://:{own_valkey.password}@{own_valkey.host}:{own_valkey.port}"
    with closing(Cold(url, None)) as other:
        for each in (cold, other):
            each.has(0)
            time.sleep(0.1)
            each.tier.tick()
            assert each.tier.degraded is not None
            assert own_valkey.password not in each.tier.degraded
            assert own_valkey.password not in repr(each.link._config)
    assert caplog.records
    assert own_valkey.password not in caplog.text
    admin("CONFIG SET", "requirepass", own_valkey.password)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """An authority, a certificate of it for localhost, and another authority."""
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem",
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=other -keyout o.key -out other.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost "
        "-keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 "
        "-copy_extensions copy -out server.pem",
    ):
        done = subprocess.run(["openssl", *command.split()], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
    return tmp_path


def test_tls_is_spoken_and_the_certificate_checked(
    certificates: Path, own_valkey: EmbeddedValkey
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    with closing(TcpProxy(own_valkey.port, tls=context)) as proxy:

        def cold(host: str, authority: str) -> Cold:
            url = f"rediss://{host}:{proxy.port}"
            return Cold(url, own_valkey.password, ca_file=certificates / authority)

        with closing(cold("localhost", "ca.pem")) as trusted:
            assert trusted.put(0)
            assert trusted.has(0)
        for host, authority in (("localhost", "other.pem"), ("127.0.0.1", "ca.pem")):
            with closing(cold(host, authority)) as distrustful:
                assert not distrustful.has(0)
                assert distrustful.tier.degraded is not None
                assert "certificate verify failed" in distrustful.tier.degraded


@pytest.mark.parametrize("url", ["http://host", "host:6379", "", "valkey://host"])
def test_a_url_that_is_none_of_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a Redis URL starts with one of redis, rediss, unix"):
        RedisConfig(url)
