"""Everything that can go wrong between a router and its replicas, at once and at random."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest
import torch

from protos import expert_pb2, tensor_pb2
from services import wire
from services.duplex import CLOCK_KEY
from services.expert.replica import ExpertReplica
from services.router import hedging
from services.router.router import Router
from tests.services.dispatch_plane import (
    DispatchPlane,
    ScriptedExpert,
    dispatch_plane,
    even_groups,
    table_of,
    until,
)
from tests.services.expert_banks import random_call, seeded_bank

NUM_GROUPS = 2
GROUPS = even_groups(NUM_GROUPS)


class FaultyExpert(ScriptedExpert):
    """Exact most of the time; else late, wrong, full, or gone."""

    def __init__(self, expert_ids: list[int], draw: random.Random) -> None:
        super().__init__()
        self._replica = ExpertReplica("faulty", seeded_bank(expert_ids))
        self._draw = draw
        self.is_well = False

    async def Dispatch(
        self,
        request_iterator: AsyncIterator[expert_pb2.ExpertRows],
        context: grpc.aio.ServicerContext[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs],
    ) -> None:
        now = asyncio.get_running_loop().time()
        await context.send_initial_metadata(((CLOCK_KEY, str(now)),))
        async for message in request_iterator:
            self.num_calls += 1
            fate = 1.0 if self.is_well else self._draw.random()
            if fate < 0.03:
                return  # what it has read, this call and those behind it, is lost
            if fate < 0.1:
                await asyncio.sleep(0.03)
            answer = self._exact(message)
            if 0.1 <= fate < 0.15:
                answer.pair_rows = answer.pair_rows[:-1] + b"\x7f"
            elif 0.15 <= fate < 0.2:
                code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                answer = expert_pb2.ExpertOutputs(
                    call_id=message.call_id, error=tensor_pb2.CallError(code=code, message="full")
                )
            await context.write(answer)

    def _exact(self, message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
        pair_rows = self._replica.compute(wire.decode_expert_rows(message))
        return wire.encode_expert_outputs(message.call_id, pair_rows)


@pytest.mark.parametrize("seed", range(2))
async def test_no_fault_changes_or_loses_a_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(hedging, "HEDGE_FLOOR_SECONDS", 0.003)
    draw = random.Random(seed)
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        plane = await stack.enter_async_context(dispatch_plane(tmp_path, num_groups=NUM_GROUPS))
        faulty: list[FaultyExpert] = []
        addresses: list[list[str]] = []
        for group_id, expert_ids in enumerate(GROUPS):
            experts = [FaultyExpert(expert_ids, random.Random(draw.random())) for _ in range(3)]
            addresses.append(
                [
                    await stack.enter_async_context(
                        expert.serving(f"unix:{tmp_path}/faulty-{group_id}-{i}.sock")
                    )
                    for i, expert in enumerate(experts)
                ]
            )
            faulty += experts
        router = plane.router
        await router.update(table_of(2, GROUPS, addresses))

        async with asyncio.TaskGroup() as tasks:
            crossing = [tasks.create_task(_cross(plane, 40, 1000 * seed + i)) for i in range(6)]
            await _change_tables(router, addresses, draw, crossing)
        for expert in faulty:
            expert.is_well = True
        await _cross(plane, 5, seed)

        counters = router.counters
        assert (counters.calls, counters.failed_calls) == (6 * 40 + 5, 0)
        assert (router.num_under_way, router.num_waiting) == (0, 0)
        assert counters.resent_parts > 0
        # Nothing is owed for ever: also what was hedged, and what nobody waited for.
        await until(lambda: not any(link.outstanding_pairs for link in router.links))


async def _cross(plane: DispatchPlane, num_crossings: int, seed: int) -> None:
    for i in range(num_crossings):
        call = random_call(1 + i % 7, layer=i % 3, seed=seed + i)
        assert torch.equal(await (await plane.experts.submit(call)), plane.expected(call))


async def _change_tables(
    router: Router,
    addresses: list[list[str]],
    draw: random.Random,
    while_running: list[asyncio.Task[None]],
) -> None:
    """Other replicas every few crossings, sometimes none of a group; all of them in the end."""
    while not all(task.done() for task in while_running):
        before = router.counters.calls
        chosen = [
            draw.sample(group, k=draw.choice((0, 1, 1, 2, 2, 3, 3, 3))) for group in addresses
        ]
        await router.update(table_of(router.table.epoch + 1, GROUPS, chosen), 0.05)
        if not all(chosen):  # crossings wait now; they go on with the next table
            await asyncio.sleep(0.005)
        else:
            await until(
                lambda before=before: (  # type: ignore[misc]
                    router.counters.calls >= before + 10
                    or router.num_waiting > 0
                    or all(task.done() for task in while_running)
                )
            )
    await router.update(table_of(router.table.epoch + 1, GROUPS, addresses))
