"""Real replicas, a real router and a real worker's end, in the test's own event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio
import torch

from model1.moe import ExpertBank, ExpertCall, local_sum
from protos import expert_pb2, expert_pb2_grpc
from services import rpc
from services.attention.experts import RoutedExperts
from services.duplex import CLOCK_KEY
from services.expert.replica import ExpertReplica
from services.expert.server import expert_service
from services.router.router import REPLICA_WAIT_SECONDS, Router
from services.router.routing import RoutingTable
from services.router.server import router_service
from tests.services.expert_banks import NUM_EXPERTS, seeded_bank


@dataclass(slots=True)
class DispatchPlane:
    replicas: dict[str, ExpertReplica]  # by address
    servers: dict[str, rpc.RunningServer]
    router: Router
    router_server: rpc.RunningServer
    experts: RoutedExperts
    all_experts: ExpertBank

    def expected(self, call: ExpertCall) -> torch.Tensor:
        with torch.inference_mode():
            return local_sum(self.all_experts, call)


def even_groups(num_groups: int) -> list[list[int]]:
    size = NUM_EXPERTS // num_groups
    return [list(range(start, start + size)) for start in range(0, NUM_EXPERTS, size)]


def table_of(
    epoch: int, groups: Sequence[Sequence[int]], addresses: Sequence[Sequence[str]]
) -> RoutingTable:
    replicas_of_expert: list[Sequence[str]] = [()] * NUM_EXPERTS
    for expert_ids, replicas in zip(groups, addresses, strict=True):
        for expert_id in expert_ids:
            replicas_of_expert[expert_id] = replicas
    return RoutingTable.of(epoch, replicas_of_expert)


async def start_replica(
    address: str, expert_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[ExpertReplica, rpc.RunningServer]:
    replica = ExpertReplica(f"replica-{address[-12:]}", seeded_bank(expert_ids, dtype))
    return replica, await rpc.start_server([expert_service(replica)], address)


class ScriptedExpert(expert_pb2_grpc.ExpertServicer):
    """A replica that goes wrong: answers what `reply` makes of a call, perhaps late, or nothing."""

    def __init__(
        self, reply: Callable[[expert_pb2.ExpertRows], expert_pb2.ExpertOutputs] | None = None
    ) -> None:
        self.num_calls = 0
        self.delay_seconds = 0.0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._reply = reply

    async def Dispatch(
        self,
        request_iterator: AsyncIterator[expert_pb2.ExpertRows],
        context: grpc.aio.ServicerContext[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs],
    ) -> None:
        await context.send_initial_metadata(((CLOCK_KEY, str(time.monotonic())),))
        async for message in request_iterator:
            self.num_calls += 1
            await asyncio.sleep(self.delay_seconds)
            await self.may_answer.wait()
            if self._reply:
                await context.write(self._reply(message))

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[str]:
        name = expert_pb2.DESCRIPTOR.services_by_name["Expert"].full_name
        register = partial(expert_pb2_grpc.add_ExpertServicer_to_server, self)
        server = await rpc.start_server([rpc.Service(name, register)], address)
        try:
            yield server.address
        finally:
            await server.stop(grace_seconds=0.0)


async def until(reached: Callable[[], bool], timeout_seconds: float = 30.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not reached():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.002)


@asynccontextmanager
async def dispatch_plane(
    directory: Path,
    *,
    num_groups: int = 2,
    replicas_per_group: int = 1,
    dtype: torch.dtype = torch.float32,
    replica_wait_seconds: float = REPLICA_WAIT_SECONDS,
) -> AsyncIterator[DispatchPlane]:
    groups = even_groups(num_groups)
    replicas: dict[str, ExpertReplica] = {}
    servers: dict[str, rpc.RunningServer] = {}
    addresses: list[list[str]] = []
    async with AsyncExitStack() as stack:
        for group_id, expert_ids in enumerate(groups):
            addresses.append([])
            for copy_id in range(replicas_per_group):
                address = f"unix:{directory}/g{group_id}r{copy_id}.sock"
                replicas[address], servers[address] = await start_replica(
                    address, expert_ids, dtype
                )
                stack.push_async_callback(servers[address].stop, 0.5)
                addresses[-1].append(address)
        router = Router("router-0", replica_wait_seconds=replica_wait_seconds)
        stack.push_async_callback(router.close)
        assert await router.update(table_of(1, groups, addresses)) == ()
        router_server = await rpc.start_server(
            [router_service(router)], f"unix:{directory}/router.sock"
        )
        stack.push_async_callback(router_server.stop, 0.5)
        experts = await RoutedExperts.open(router_server.address)
        stack.push_async_callback(experts.close)
        yield DispatchPlane(
            replicas, servers, router, router_server, experts, seeded_bank(range(8), dtype)
        )
