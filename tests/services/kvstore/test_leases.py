"""What a worker's threads may touch, when the worker dies, freezes or comes back."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.kvstore.leases import ClientLock, client_path
from services.kvstore.server import KvStoreServer
from tests.services.kvstore.blobs import NBYTES, eventually, item_of, key_of
from tests.services.kvstore.conftest import Connect, OpenStore, idle
from tests.services.kvstore.tcp_proxy import TcpProxy

CLIENT_ID = "0123456789abcdef" * 2


@contextlib.contextmanager
def _worker(address: str, what: str) -> Iterator["subprocess.Popen[str]"]:
    words = [sys.executable, "-m", "tests.services.kvstore.worker_process", address, what]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).strip()


async def _has_clients(server: KvStoreServer, number: int) -> bool:
    return server.leases.num_clients == number


@pytest.mark.parametrize("what", ["read", "save"])
async def test_the_leases_of_a_killed_worker_end(open_store: OpenStore, what: str) -> None:
    server = await open_store()
    with _worker(server.address, what) as worker:
        assert await _line(worker) == "busy"
        assert server.leases.num_leases == 1
        worker.kill()
        await idle(server)
        assert server.leases.num_leases == 0
        server.check()


@pytest.mark.parametrize("what", ["read", "save"])
async def test_a_worker_whose_stream_broke_keeps_what_it_touches(
    open_store: OpenStore, connect: Connect, what: str
) -> None:
    server = await open_store()
    other = await connect(server)
    proxy = TcpProxy(int(server.address.rpartition(":")[2]))
    with contextlib.closing(proxy), _worker(f"127.0.0.1:{proxy.port}", what) as worker:
        assert await _line(worker) == "busy"
        worker.send_signal(signal.SIGSTOP)
        proxy.cut()
        await eventually(lambda: _has_clients(server, 1))
        # Everybody else writes all over RAM meanwhile.
        many = 3 * server.store.ram.arena.capacity_bytes // NBYTES
        for start in range(100, 100 + many, 16):
            await other.save([item_of(number) for number in range(start, start + 16)])
        assert server.leases.end_those_of_the_dead() == 0
        assert server.leases.num_leases == 1
        worker.send_signal(signal.SIGCONT)
        assert await _line(worker) == "same"
        # Back on a new stream, it has let go.
        await eventually(lambda: _has_clients(server, 2))
        await idle(server)
        server.check()


async def test_a_client_that_says_hello_again_has_no_leases(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    worker = await connect(server)
    await worker.save([item_of(0)])
    await server.store.flush()
    lock = ClientLock(client_path(server.store.ram.arena.path, CLIENT_ID))
    book = server.leases
    holder = book.connect(CLIENT_ID)
    resident = server.store.ram.use(key_of(0))
    assert resident is not None
    assert book.grant(holder, resident) is not None
    book.disconnect(holder)
    assert (book.end_those_of_the_dead(), book.num_leases) == (0, 1)
    again = book.connect(CLIENT_ID)
    assert book.num_leases == 0
    # What the first stream still had under way comes too late to be a lease.
    resident = server.store.ram.use(key_of(0))
    assert resident is not None
    assert book.grant(holder, resident) is None
    assert server.store.ram.num_uses == 0
    book.disconnect(again)
    lock.close()


async def test_a_dead_clients_leases_end_when_its_lock_is_free(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    worker = await connect(server)
    await worker.save([item_of(0)])
    path = client_path(server.store.ram.arena.path, CLIENT_ID)
    lock = ClientLock(path)
    holder = server.leases.connect(CLIENT_ID)
    resident = server.store.ram.use(key_of(0))
    assert resident is not None
    server.leases.grant(holder, resident)
    server.leases.disconnect(holder)
    assert server.leases.end_those_of_the_dead() == 0
    lock.close()
    assert server.leases.end_those_of_the_dead() == 1
    assert not path.exists()


@pytest.mark.parametrize("client_id", ["", "../../etc/passwd", "g" * 32, "A" * 32, "0" * 33])
async def test_a_client_id_is_no_path(open_store: OpenStore, client_id: str) -> None:
    server = await open_store()
    with pytest.raises(ValueError, match="client id"):
        server.leases.connect(client_id)
