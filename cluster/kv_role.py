"""What a KV store's process builds: its folders, a Redis if it is to start one, and the store.

Decides where things lie on its node; what is kept in them is services.kvstore's.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import IO

from cluster.config import KvSettings
from cluster.members import DeploymentError, Listening, Peers
from cluster.roles import Place, Serve, Serving
from cluster.runtime_dir import runtime_dir

SHARED_MEMORY = Path("/dev/shm")
# Beyond what is asked for: others use the file system too.
SPARE_BYTES = 64 * 2**20


def load_kv_store(name: str, settings: KvSettings, place: Place) -> Serve:
    from services.kvstore.config import KvStoreConfig
    from services.kvstore.disk import DiskConfig, FsyncPolicy
    from services.kvstore.server import KvStoreServer
    from services.kvstore.sessions import Durability

    async def serve(peers: Peers) -> Serving:
        with ExitStack() as folders:
            shared = folders.enter_context(
                runtime_dir(shared_memory(settings.ram_bytes, otherwise=place.runtime_dir))
            )
            own = disk = None
            if settings.disk_path is not None:
                own = folders.enter_context(claimed_folder(settings.disk_path))
                disk = DiskConfig(
                    own / "blobs", settings.disk_bytes, fsync=FsyncPolicy(settings.disk_fsync)
                )
            server = await KvStoreServer.open(
                KvStoreConfig(
                    name=name,
                    address=f"{place.bind_host}:0",
                    arena_dir=shared,
                    ram_bytes=settings.ram_bytes,
                    disk=disk,
                    sessions_dir=own,
                    sessions_durability=Durability(settings.disk_fsync),
                )
            )
            held = folders.pop_all()

        async def stop(grace_seconds: float) -> None:
            await server.stop(grace_seconds)
            held.close()

        async def update(peers: Peers) -> None:
            await server.set_peers(address for _, address in peers.store_addresses)

        return Serving(Listening(server.address), lambda: server.num_requests, stop, update)

    return serve


def shared_memory(num_bytes: int, *, otherwise: Path) -> Path:
    """Where a file of so many bytes stays in memory; a container may have too little of that."""
    try:
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return otherwise
    return SHARED_MEMORY if free_bytes >= num_bytes + SPARE_BYTES else otherwise


@contextmanager
def claimed_folder(parent: Path) -> Iterator[Path]:
    """The first of parent/0, parent/1, ... that no living store holds, so that several stores of
    one machine can be given the same path, and a restart finds what was there."""
    try:
        folder, lock = _claim(parent)
    except OSError as error:
        raise DeploymentError(f"cannot use kv.disk_path {parent}: {error.strerror}") from error
    with lock:  # held until it is closed, or the process has ended
        yield folder


def _claim(parent: Path) -> tuple[Path, IO[str]]:
    for number in count():
        folder = parent / str(number)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        return folder, lock
    raise AssertionError("count() does not end")
