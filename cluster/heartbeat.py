"""Notices the loss of a node before Ray does: one where no actor answers is taken for lost.

Every process of it is asked again and again, so that one that computes for long, or loads, takes no
node down. Knows neither what is lost with a node nor who takes its place: its actors end, which is
what others look out for.
"""

import asyncio
import logging

from cluster.members import DeploymentError, Machines, MemberState
from cluster.roster import Roster

log = logging.getLogger(__name__)

# Questions to each process in the time after which a silent node is lost.
NUM_QUESTIONS = 10


class Heartbeat:
    def __init__(
        self, roster: Roster, machines: Machines, own_node_id: str, timeout_seconds: float
    ) -> None:
        """`own_node_id` is the supervisor's: while that one is away there is nobody to notice."""
        self._roster = roster
        self._own_node_id = own_node_id
        self._machines = machines
        self._timeout_seconds = timeout_seconds
        self._heard: dict[int, float] = {}  # by node, on the loop's clock
        self._asked: dict[str, asyncio.Task[None]] = {}  # by name, one question at a time

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._ask_all()
                self._judge()
                await asyncio.sleep(self._timeout_seconds / NUM_QUESTIONS)
        finally:
            for task in self._asked.values():
                task.cancel()

    def _ask_all(self) -> None:
        now = asyncio.get_running_loop().time()
        nodes = set()
        for member in self._roster.members:
            spec = member.spec
            is_here = member.process.node_id == self._own_node_id
            if is_here or member.state is not MemberState.READY:
                continue
            nodes.add(spec.node)
            self._heard.setdefault(spec.node, now)  # the silence of a new one begins now
            if spec.name not in self._asked or self._asked[spec.name].done():
                question = self._ask(spec.name, spec.node)
                self._asked[spec.name] = asyncio.create_task(question, name=f"ping {spec.name}")
        for node in self._heard.keys() - nodes:
            del self._heard[node]

    async def _ask(self, name: str, node: int) -> None:
        try:
            await self._roster.ping(name)
        except DeploymentError:
            return  # it is gone, or cannot be reached
        if node in self._heard:
            self._heard[node] = asyncio.get_running_loop().time()

    def _judge(self) -> None:
        now = asyncio.get_running_loop().time()
        for node, heard in tuple(self._heard.items()):
            if now - heard >= self._timeout_seconds:
                names = self._roster.kill_node(node)
                words = "node_lost node=%d silent_seconds=%.1f names=%s"
                log.warning(words, node, now - heard, ",".join(names))
                self._machines.lose(node)
                del self._heard[node]
