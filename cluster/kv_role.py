"""What a KV store's process builds: its folders, a Redis if it is to start one, and the store.

Decides where things lie on its node; what is kept in them is services.kvstore's.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from cluster.config import KvSettings
from cluster.members import DeploymentError, Listening, Peers, Redis
from cluster.roles import Place, Serve, Serving
from cluster.runtime_dir import remove_abandoned, runtime_dir
from protos.control_pb2 import RoleStats

if TYPE_CHECKING:
    from services.kvstore.blocking import ColdConfig
    from services.tls import Tls

SHARED_MEMORY = Path("/dev/shm")
# Beyond what is asked for: others use the file system too.
SPARE_BYTES = 64 * 2**20


def load_kv_store(name: str, settings: KvSettings, place: Place, tls: "Tls | None" = None) -> Serve:
    from services.kvstore.config import KvStoreConfig
    from services.kvstore.disk import DiskConfig, FsyncPolicy
    from services.kvstore.server import KvStoreServer
    from services.kvstore.session_rows import Durability

    async def serve(peers: Peers) -> Serving:
        with ExitStack() as parts:
            remove_abandoned(SHARED_MEMORY)  # what a store that died had: room for ours
            shared = parts.enter_context(
                runtime_dir(shared_memory(settings.ram_bytes, otherwise=place.runtime_dir))
            )
            redis = peers.redis
            if settings.redis == "embedded" and (redis is None or redis.run_by == name):
                redis = parts.enter_context(_embedded_redis(name, settings, place, last=redis))
            own = disk = None
            if settings.disk_path is not None:
                own = parts.enter_context(claimed_folder(settings.disk_path))
                disk = DiskConfig(
                    own / "blobs", settings.disk_bytes, fsync=FsyncPolicy(settings.disk_fsync)
                )
            server = await KvStoreServer.open(
                KvStoreConfig(
                    name=name,
                    address=peers.last_address or f"{place.bind_host}:0",
                    arena_dir=shared,
                    ram_bytes=settings.ram_bytes,
                    disk=disk,
                    cold=cold_config(settings, redis),
                    sessions_dir=own,
                    sessions_durability=Durability(settings.disk_fsync),
                    tls=tls,
                )
            )
            held = parts.pop_all()

        async def stop(grace_seconds: float) -> None:
            await server.stop(grace_seconds)
            held.close()

        async def update(peers: Peers) -> None:
            await server.set_peers(address for _, address in peers.store_addresses)

        await update(peers)
        listening = Listening(server.address, redis=redis)
        return Serving(listening, lambda: RoleStats(requests=server.num_requests), stop, update)

    return serve


@contextmanager
def _embedded_redis(
    name: str, settings: KvSettings, place: Place, *, last: Redis | None
) -> Iterator[Redis]:
    """A server for all stores of the deployment: it listens where they can reach it, and where they
    found the `last` one, with that one's password."""
    from services.kvstore.valkey import EmbeddedValkey, ValkeyUnavailable

    with runtime_dir(place.runtime_dir) as folder:
        try:
            server = EmbeddedValkey(
                folder,
                max_bytes=settings.redis_bytes,
                host=place.bind_host,
                port=(urlsplit(last.url).port or 0) if last else 0,
                password=last.password if last else None,
            )
        except ValkeyUnavailable as error:
            raise DeploymentError(f"{error}; kv.redis: off does without") from error
        try:
            yield Redis(server.url, server.password, run_by=name)
        finally:
            server.stop()


def cold_config(settings: KvSettings, ours: Redis | None) -> "ColdConfig | None":
    """Raises `DeploymentError` if the password is in a file that cannot be read."""
    from services.kvstore.blocking import ColdConfig
    from services.kvstore.redis_link import RedisConfig

    if ours is not None:
        redis = RedisConfig(ours.url, ours.password)
    elif settings.redis == "off":
        return None
    else:
        redis = RedisConfig(settings.redis, _password(settings), ca_file=settings.redis_ca_file)
    return ColdConfig(
        redis=redis, max_bytes=settings.redis_bytes, ttl_seconds=settings.redis_ttl_seconds
    )


def _password(settings: KvSettings) -> str | None:
    file = settings.redis_password_file
    if file is None:
        return settings.redis_password.get_secret_value() if settings.redis_password else None
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DeploymentError(f"cannot read kv.redis_password_file {file}: {reason}") from error


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
