import asyncio
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model1.moe import ExpertCall
from services.attention.experts import RoutedExperts
from services.errors import DeadlineExceeded, ExpertsUnavailable, ModelMismatch, QueueFull
from services.expert.replica import ExpertReplica
from services.wire import ExpertRows, Words
from tests.services.dispatch_plane import (
    DispatchPlane,
    ScriptedExpert,
    dispatch_plane,
    table_of,
    until,
)
from tests.services.expert_banks import NUM_EXPERTS, random_call
from tests.services.router_process import RouterProcess


def _slow_down(replica: ExpertReplica, seconds: float) -> None:
    """Every call takes at least so long, and blocks its replica as computing does."""
    compute = replica.compute

    def slowly(call: ExpertRows) -> Words:
        time.sleep(seconds)
        return compute(call)

    replica.compute = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_groups", "replicas_per_group"), [(1, 1), (2, 1), (4, 2)])
async def test_sums_are_bitwise_those_of_one_process_in_every_topology(
    tmp_path: Path, dtype: torch.dtype, num_groups: int, replicas_per_group: int
) -> None:
    async with dispatch_plane(
        tmp_path, num_groups=num_groups, replicas_per_group=replicas_per_group, dtype=dtype
    ) as plane:
        for seed, num_rows in enumerate((1, 2, 3, 17, 64)):
            call = random_call(num_rows, layer=seed % 3, seed=seed, dtype=dtype)
            sums = await (await plane.experts.submit(call))
            assert sums.dtype == torch.float32
            assert torch.equal(sums, plane.expected(call))


async def test_several_crossings_overlap_on_one_stream(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        calls = [random_call(4, layer=seed % 3, seed=seed) for seed in range(8)]
        pending = [await plane.experts.submit(call) for call in calls]
        for call, sums in zip(calls, await asyncio.gather(*pending), strict=True):
            assert torch.equal(sums, plane.expected(call))


async def test_a_tensor_from_inference_mode_may_be_sent(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        call = random_call(3)
        with torch.inference_mode():
            inferred = ExpertCall(0, call.rows * 1, call.expert_ids * 1, call.weights * 1)
        assert torch.equal(await (await plane.experts.submit(inferred)), plane.expected(call))


async def test_the_rows_leave_before_the_caller_goes_on_computing(tmp_path: Path) -> None:
    with _plane_in_a_thread(tmp_path) as plane:
        experts = await RoutedExperts.open(plane.router_server.address)
        call = random_call(2)
        sent = await experts.submit(call)
        # From here on this loop is blocked, as by the shared expert.
        give_up_at = time.monotonic() + 30.0
        while not plane.router.counters.calls and time.monotonic() < give_up_at:
            time.sleep(0.005)  # noqa: ASYNC251
        assert plane.router.counters.calls == 1
        assert torch.equal(await sent, plane.expected(call))
        await experts.close()


@contextmanager
def _plane_in_a_thread(directory: Path) -> Iterator[DispatchPlane]:
    planes: queue.Queue[tuple[DispatchPlane, asyncio.Event]] = queue.Queue()

    async def host() -> None:
        async with dispatch_plane(directory) as plane:
            done = asyncio.Event()
            planes.put((plane, done))
            await done.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(host(),))
    thread.start()
    plane, done = planes.get(timeout=60.0)
    try:
        yield plane
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


async def test_more_calls_than_the_bound_are_refused_at_once(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        experts = RoutedExperts(plane.router_server.address, max_calls_under_way=1)
        await experts.wait_connected()
        first = await experts.submit(random_call(1))
        with pytest.raises(QueueFull, match="1 layer crossings"):
            await experts.submit(random_call(1))
        await first
        await (await experts.submit(random_call(1)))
        await experts.close()


async def test_a_call_for_another_model_fails_with_the_replicas_words(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        with pytest.raises(ModelMismatch, match="layer 99: the model of"):
            await (await plane.experts.submit(random_call(1, layer=99)))
        unknown = random_call(1)
        unknown.expert_ids[0, 1] = 4000
        with pytest.raises(ModelMismatch, match="expert 4000: router router-0 knows 8 experts"):
            await (await plane.experts.submit(unknown))
        assert torch.equal(
            await (await plane.experts.submit(random_call(2))), plane.expected(random_call(2))
        )


async def test_a_deadline_that_passes_is_named_and_frees_every_hop(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        for replica in plane.replicas.values():
            _slow_down(replica, 0.1)
        with pytest.raises(DeadlineExceeded):
            await (await plane.experts.submit(random_call(8), timeout_seconds=0.02))
        await until(lambda: not plane.router.num_under_way)
        await (await plane.experts.submit(random_call(1)))


async def test_a_cancelled_crossing_is_dropped_by_the_router(tmp_path: Path) -> None:
    async with (
        dispatch_plane(tmp_path) as plane,
        ScriptedExpert().serving(f"unix:{tmp_path}/silent.sock") as silent,
    ):
        await plane.router.update(table_of(2, [range(8)], [[silent]]))
        sent = await plane.experts.submit(random_call(2))
        await until(lambda: plane.router.num_under_way == 1)
        sent.cancel()
        await until(lambda: not plane.router.num_under_way)
        (link,) = plane.router.links
        assert link.outstanding_pairs == 4  # the replica still owes them, to nobody
        await plane.router.update(table_of(3, [range(8)], [[next(iter(plane.servers))]]))
        await until(lambda: link.closed)


async def test_a_worker_that_leaves_without_a_word_has_its_crossings_dropped(
    tmp_path: Path,
) -> None:
    async with (
        dispatch_plane(tmp_path) as plane,
        ScriptedExpert().serving(f"unix:{tmp_path}/silent.sock") as silent,
    ):
        await plane.router.update(table_of(2, [range(8)], [[silent]]))
        sent = await plane.experts.submit(random_call(2))
        await until(lambda: plane.router.num_under_way == 1)
        await plane.experts.close()
        await until(lambda: not plane.router.num_under_way)
        with pytest.raises(ExpertsUnavailable):
            await sent


@pytest.fixture
def router_process(tmp_path: Path) -> Iterator[RouterProcess]:
    process = RouterProcess(f"unix:{tmp_path}/router-process.sock", NUM_EXPERTS)
    yield process
    process.kill()


async def test_crossings_under_way_outlive_their_router(
    tmp_path: Path, router_process: RouterProcess
) -> None:
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        (replica,) = plane.servers
        await router_process.start(replica)
        experts = await RoutedExperts.open(router_process.address, 30.0)
        first = random_call(2)
        assert torch.equal(await (await experts.submit(first)), plane.expected(first))
        router_process.signal(signal.SIGSTOP)  # so that it dies with calls unanswered
        calls = [random_call(4, layer=seed % 3, seed=seed) for seed in range(6)]
        pending = [await experts.submit(call) for call in calls[:2]]
        given_up = await experts.submit(calls[2])
        router_process.kill()
        await until(lambda: not experts.connected)
        pending += [await experts.submit(call) for call in calls[2:]]
        given_up.cancel()
        await router_process.start(replica)
        async with asyncio.timeout(30):
            for call, sums in zip([*calls[:2], *calls[2:]], pending, strict=True):
                assert torch.equal(await sums, plane.expected(call))
        await experts.close()


async def test_a_router_that_stays_away_fails_the_call_at_its_deadline(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        await plane.router_server.stop(grace_seconds=0.0)
        await until(lambda: not plane.experts.connected)
        sums = await plane.experts.submit(random_call(2), timeout_seconds=0.05)
        address = plane.router_server.address
        with pytest.raises(
            DeadlineExceeded, match=f"router at {address} within 0.05 s .no connection: "
        ):
            await sums


async def test_crossings_kept_for_a_router_are_bounded_and_end_with_the_link(
    tmp_path: Path,
) -> None:
    experts = RoutedExperts(f"unix:{tmp_path}/none.sock", max_calls_under_way=1)
    sums = await experts.submit(random_call(1))
    with pytest.raises(QueueFull, match="1 layer crossings"):
        await experts.submit(random_call(1))
    await experts.close()
    with pytest.raises(ExpertsUnavailable, match="was closed"):
        await sums


async def test_no_router_is_an_error_that_names_the_address(tmp_path: Path) -> None:
    with pytest.raises(ExpertsUnavailable, match=f"no router answers at unix:{tmp_path}/none"):
        await RoutedExperts.open(f"unix:{tmp_path}/none", connect_timeout_seconds=0.05)
