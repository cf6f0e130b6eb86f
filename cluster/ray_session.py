"""Owns the connection to Ray: a Ray of our own on this machine, or one that runs already.

The only module that starts or stops Ray. Says which nodes there are, not what runs on them.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterSettings
from cluster.priority import start_niceness
from cluster.roles import Place
from cluster.runtime_dir import LENGTH as RUNTIME_DIR_LENGTH
from cluster.runtime_dir import runtime_dir
from cluster.topology import SLOTS, Role, Room

# Ray puts Unix sockets about 70 characters below its folder, and the kernel's limit is 107.
MAX_TEMP_DIR_LENGTH = 36
# Nothing of ours travels through the object store, so the least that Ray accepts.
OBJECT_STORE_BYTES = 80 * 1024 * 1024

# Of our own Ray: more than anybody starts on one machine. Its cores do not bound us either, since
# replicas that wait for each other share them well.
OWN_SLOTS = {role: 10_000 for role in SLOTS}

# What a process that computes starts with.
COMPUTE_ENVIRONMENT = {
    # Two compute threads collapse when anything else runs on a small machine.
    "OMP_NUM_THREADS": "1",
    # glibc would hand every large block back to the kernel and fault it in again, thousands of
    # pages a step: about a tenth of an attention worker's CPU time (mini, batch 32; two runs each
    # way on a busy machine). So: one heap for all threads, blocks up to 32 MiB (glibc's maximum)
    # in it, and it keeps half a GiB.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


class RayUnavailable(Exception):
    """Ray did not start, or the cluster of the given address cannot be reached."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster, and how many slots of each kind Ray was told it has."""

    node_id: str
    place: Place
    num_slots: Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class Hosts:
    """The living nodes, this process's own first, and what actors that compute ask Ray for."""

    nodes: tuple[Node, ...]
    are_ours_alone: bool  # and never more
    have_slots: bool

    @property
    def rooms(self) -> tuple[Room, ...]:
        return tuple(Room(slots=node.num_slots if self.have_slots else None) for node in self.nodes)


@contextmanager
def ray_session(settings: ClusterSettings, *, num_actors: int) -> Iterator[Hosts]:
    """Connected to Ray inside. A Ray of our own is gone with all of its processes afterwards."""
    if settings.ray_address is None:
        with _temp_dir(settings.temp_dir) as folder, _own_ray(folder, num_actors):
            # Our servers stay inside. NOTE: Ray's own do not, they listen on every interface; the
            # token of `prepare_environment` is what keeps others out of them.
            node = Node(_own_node_id(), Place("127.0.0.1", folder), OWN_SLOTS)
            yield Hosts((node,), are_ours_alone=True, have_slots=True)
    else:
        with _existing_ray(settings.ray_address):
            yield _hosts_of(settings.ray_address)


@contextmanager
def _own_ray(folder: Path, num_actors: int) -> Iterator[None]:
    prepare_environment()
    import ray

    try:
        ray.init(
            "local",
            # One core an actor: Ray starts that many workers ahead, and an idle role costs none.
            num_cpus=num_actors,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            object_store_memory=OBJECT_STORE_BYTES,
            resources={SLOTS[role]: num_slots for role, num_slots in OWN_SLOTS.items()},
            _temp_dir=str(folder),
        )
    except BaseException as error:
        ray.shutdown()  # of what has started, also when a signal came in between
        if not isinstance(error, Exception):
            raise
        raise RayUnavailable(f"Ray did not start: {_first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _existing_ray(address: str) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            # Everybody imports the installed package; there is nothing to upload.
            runtime_env={"env_vars": COMPUTE_ENVIRONMENT},
        )
    except Exception as error:
        raise RayUnavailable(f"no Ray cluster at {address}: {_first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _own_node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _hosts_of(address: str) -> Hosts:
    """A cluster that has no slots is shared by its cores; one that has some must have both kinds.
    Raises `RayUnavailable`."""
    own = _own_node_id()
    nodes = tuple(sorted(living_nodes(), key=lambda node: (node.node_id != own, node.node_id)))
    totals = {role: sum(node.num_slots[role] for node in nodes) for role in SLOTS}
    if not any(totals.values()):
        return Hosts(nodes, are_ours_alone=False, have_slots=False)
    if lacking := [SLOTS[role] for role, total in totals.items() if not total]:
        there = next(SLOTS[role] for role, total in totals.items() if total)
        raise RayUnavailable(
            f"the Ray cluster at {address} has nodes with {there} and none with {lacking[0]}: "
            f"start one with --resources='{{\"{lacking[0]}\": N}}', or none with either"
        )
    return Hosts(nodes, are_ours_alone=False, have_slots=True)


def hosts_with_slots() -> Hosts:
    """Of the cluster that this process is in. Those with slots may come later."""
    own = _own_node_id()
    nodes = sorted(living_nodes(), key=lambda node: (node.node_id != own, node.node_id))
    return Hosts(tuple(nodes), are_ours_alone=False, have_slots=True)


def living_nodes() -> tuple[Node, ...]:
    import ray

    known: list[dict[str, Any]] = ray.nodes()
    return tuple(
        Node(
            node["NodeID"],
            Place(node["NodeManagerAddress"], Path("/tmp")),
            {role: int(node["Resources"].get(name, 0)) for role, name in SLOTS.items()},
        )
        for node in known
        if node["Alive"]
    )


def prepare_environment() -> None:
    """What Ray's processes inherit from this one. Whatever the user has set stays."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would hide the GPUs from actors that reserve none; ours share what there is.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's default is 15: serving would yield to anything else that runs on the machine.
        "RAY_worker_niceness": str(start_niceness()),
        # A node that was killed is Ray's loss after five of these, not after 14 s; one that is only
        # starved answers within one of these. Our own heartbeat notices one that is frozen.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "5000",
        **COMPUTE_ENVIRONMENT,
    }.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        # Ray would otherwise write a token into the home folder and share it with other clusters.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _temp_dir(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None:
        if len(str(wanted)) > MAX_TEMP_DIR_LENGTH:
            raise RayUnavailable(
                f"cluster.temp_dir {wanted} has {len(str(wanted))} characters; Unix sockets below "
                f"it leave room for {MAX_TEMP_DIR_LENGTH}"
            )
        yield wanted
        return
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) + RUNTIME_DIR_LENGTH > MAX_TEMP_DIR_LENGTH:
        parent = Path("/tmp")
    with runtime_dir(parent) as folder:
        yield folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
