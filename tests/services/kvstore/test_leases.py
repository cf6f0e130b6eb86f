"""What a worker's threads may touch, when the worker dies, freezes or comes back."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.kvstore.client import KvClient
from services.kvstore.leases import ClientLock, LeaseBook, client_path
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from tests.services.kvstore.blobs import NBYTES, client_config, eventually, item_of, key_of, read
from tests.services.kvstore.conftest import Connect, OpenStore, idle
from tests.services.kvstore.line import line_to

CLIENT_ID = "0123456789abcdef" * 2


@contextlib.contextmanager
def _worker(address: str) -> Iterator["subprocess.Popen[str]"]:
    words = [sys.executable, "-m", "tests.services.kvstore.worker_process", address]
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


async def test_the_leases_of_a_killed_worker_end(open_store: OpenStore) -> None:
    server = await open_store()
    with _worker(server.address) as worker:
        assert await _line(worker) == "filling"
        assert server.leases.num_leases == 2
        worker.kill()
        await idle(server)
        assert server.leases.num_leases == 0
        server.check()


async def test_a_worker_whose_stream_broke_keeps_what_its_threads_touch(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    other = await connect(server)
    async with line_to(server.address) as line:
        with _worker(line.address) as worker:
            assert await _line(worker) == "filling"
            worker.send_signal(signal.SIGSTOP)
            line.cut()
            await eventually(lambda: _has_clients(server, 1))
            # Everybody else writes all over RAM meanwhile.
            many = 3 * server.store.ram.arena.capacity_bytes // NBYTES
            for start in range(100, 100 + many, 16):
                await other.save([item_of(number) for number in range(start, start + 16)])
            assert server.leases.end_those_of_the_dead() == 0
            assert server.leases.num_leases == 2
            worker.send_signal(signal.SIGCONT)
            assert (await _line(worker)).split()[0] == "same"
            # Back on a new stream, it lets go of both.
            await eventually(lambda: _has_clients(server, 2))
            await idle(server)
            server.check()
    assert (await read(other, [0]))[0] in (Tier.RAM, Tier.DISK, None)


async def _has_clients(server: KvStoreServer, number: int) -> bool:
    return server.leases.num_clients == number


async def test_a_worker_that_comes_back_ends_the_leases_it_does_not_use(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    worker = await connect(server)
    await worker.save([item_of(0), item_of(1)])
    await server.store.flush()
    lock = ClientLock(client_path(server.store.ram.arena.path, CLIENT_ID))
    book: LeaseBook = server.leases
    holder = book.connect(CLIENT_ID, ())
    leases = []
    for number in (0, 1):
        resident = server.store.ram.use(key_of(number))
        assert resident is not None
        leases.append(book.grant(holder, resident))
    book.disconnect(holder)
    assert (book.end_those_of_the_dead(), book.num_leases) == (0, 2)
    assert leases[1] is not None
    again = book.connect(CLIENT_ID, [leases[1], 999])
    assert list(again.leases) == [leases[1]]
    # What the first stream still had under way comes too late to be a lease.
    resident = server.store.ram.use(key_of(0))
    assert resident is not None
    assert book.grant(holder, resident) is None
    book.release(again, leases[1])
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
    holder = server.leases.connect(CLIENT_ID, ())
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
        server.leases.connect(client_id, ())


async def test_a_client_that_reconnects_takes_its_leases_along(open_store: OpenStore) -> None:
    server = await open_store()
    async with line_to(server.address) as line:
        worker = await KvClient.open(client_config(line.address))
        async with asyncio.timeout(10):
            await worker.wait_connected()
        await worker.save([item_of(0)])
        deadline_s = asyncio.get_running_loop().time() + 10
        async with worker.acquire([key_of(0)], deadline_s=deadline_s) as blocks:
            block = await anext(blocks)
            line.cut()

            async def is_back() -> bool:
                return worker.connected and worker.num_breaks == 1

            await eventually(is_back)
            assert await worker.locate([key_of(0)]) == [Tier.RAM]
            assert (server.leases.num_leases, worker.num_leases) == (1, 1)
            block.release()
            await idle(server)
        assert await read(worker, [0]) == [Tier.RAM]
        await worker.close()
