"""Several nodes of a Ray cluster on this machine, that is several raylets, and their end.

Each node is a raylet with all that it started. The first one is that of the command itself.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.ray_session import OBJECT_STORE_BYTES, prepare_environment

# Of each node, so that any one of them has room for what the others had; each actor that computes
# takes one, and Ray starts that many workers ahead.
NODE_CORES = 8


class LocalNodes:
    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._frozen: list[int] = []  # file descriptors of processes, whose numbers may be reused
        self.address: str = cluster.address

    def kill(self, node_id: str) -> None:
        """The raylet; its workers end with it."""
        os.kill(self._raylet(node_id), signal.SIGKILL)

    def freeze(self, node_id: str) -> None:
        """Every process of it: connections stay open, and nobody answers."""
        for pid in tuple(process_tree(self._raylet(node_id))):
            with contextlib.suppress(ProcessLookupError):
                self._frozen.append(os.pidfd_open(pid))
        self._send_frozen(signal.SIGSTOP)

    def thaw(self) -> None:
        """Whoever is frozen goes on."""
        self._send_frozen(signal.SIGCONT)
        self._forget_frozen()

    def replace(self, node_id: str) -> None:
        """End what is left of it; another node joins. Blocks."""
        for pid in process_tree(self._raylet(node_id)):
            send(pid, signal.SIGKILL)
        self._cluster.remove_node(self._node(node_id), allow_graceful=False)
        self.add()

    def add(self) -> None:
        self._cluster.add_node(num_cpus=NODE_CORES, object_store_memory=OBJECT_STORE_BYTES)

    def end(self) -> None:
        """Of all nodes; what is frozen ends by no other signal."""
        self._send_frozen(signal.SIGKILL)
        self._forget_frozen()
        self._cluster.shutdown()

    def _send_frozen(self, number: signal.Signals) -> None:
        for descriptor in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)

    def _forget_frozen(self) -> None:
        frozen, self._frozen = self._frozen, []
        for descriptor in frozen:
            os.close(descriptor)

    def _node(self, node_id: str) -> Any:
        return next(node for node in self._cluster.worker_nodes if node.node_id == node_id)

    def _raylet(self, node_id: str) -> int:
        [raylet] = self._node(node_id).all_processes["raylet"]
        pid: int = raylet.process.pid
        return pid


@contextmanager
def local_nodes(num_nodes: int) -> Iterator[LocalNodes]:
    prepare_environment()
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": NODE_CORES,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    # Ray's own clean-up at exit is a signal handler, and nodes are added in other threads as well.
    cluster: Any = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    nodes = LocalNodes(cluster)
    try:
        for _ in range(num_nodes - 1):
            nodes.add()
        yield nodes
    finally:
        nodes.end()


def process_tree(root: int) -> Iterator[int]:
    """The process, then what it started, and so on."""
    yield root
    for child in children(root):
        yield from process_tree(child)


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have died meanwhile
        os.kill(pid, number)
