"""The router against real replicas: loss, refusal, wrong answers, tables that change under way."""

import asyncio
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import torch

from model1.moe import ExpertCall
from protos import expert_pb2, router_pb2, router_pb2_grpc, tensor_pb2
from services import rpc, wire
from services.errors import DeadlineExceeded, ExpertsUnavailable
from services.expert.replica import ExpertReplica
from services.router import hedging, replica_link
from services.router.hedging import HEDGE_BURST, HEDGE_SHARE
from services.router.replica_link import ReplicaLink
from services.router.routing import RoutingTable
from services.wire import LayerRows
from tests.services.dispatch_plane import (
    DispatchPlane,
    ScriptedExpert,
    dispatch_plane,
    start_replica,
    table_of,
    until,
)
from tests.services.expert_banks import random_call, seeded_bank

ROOT = Path(__file__).parents[3]
EVERY_EXPERT = [list(range(8))]


Crossings = list[tuple[ExpertCall, asyncio.Future[torch.Tensor]]]


def _link(plane: DispatchPlane, address: str) -> ReplicaLink:
    return next(link for link in plane.router.links if link.address == address)


async def _assert_exact(plane: DispatchPlane, seed: int = 0) -> None:
    call = random_call(5, seed=seed)
    assert torch.equal(await (await plane.experts.submit(call)), plane.expected(call))


@pytest.fixture
def replica_process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    address = f"unix:{tmp_path}/process.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.services.expert_process", address, "0", "8"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline().strip() == address
    yield process, address
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def no_hedges(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is: for tests that count parts."""
    monkeypatch.setattr(hedging, "HEDGE_FLOOR_SECONDS", 600.0)
    monkeypatch.setattr(hedging, "UNMEASURED_SECONDS", 600.0)


@pytest.fixture
def equal_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """However unevenly this machine runs: no replica is passed over for being slow, nor probed."""
    monkeypatch.setattr(hedging, "SLOW_FACTOR", math.inf)


@pytest.mark.usefixtures("no_hedges")
async def test_calls_under_way_on_a_killed_replica_go_to_another(
    tmp_path: Path, replica_process: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = replica_process
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        (survivor,) = plane.servers
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address, survivor]]))
        link = _link(plane, address)
        os.kill(process.pid, signal.SIGSTOP)  # so that it dies with calls under way
        calls = [random_call(4, layer=seed % 3, seed=seed) for seed in range(6)]
        pending = [await plane.experts.submit(call) for call in calls]
        await until(lambda: link.outstanding_pairs > 0)
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            sums = await asyncio.gather(*pending)
        for call, got in zip(calls, sums, strict=True):
            assert torch.equal(got, plane.expected(call))
        assert plane.router.counters.resent_parts >= 1
        assert plane.router.counters.failed_calls == 0
        assert (link.connected, link.breaks, link.outstanding_pairs) == (False, 1, 0)


async def _freeze(plane: DispatchPlane, process: subprocess.Popen[str], address: str) -> Crossings:
    """Stop it, and submit calls until it has some; its socket stays open, and nobody answers."""
    frozen = _link(plane, address)
    await until(lambda: not frozen.outstanding_pairs)  # of a call that was hedged
    os.kill(process.pid, signal.SIGSTOP)
    calls_before = plane.router.counters.calls
    pending: Crossings = []
    while not frozen.outstanding_pairs:
        call = random_call(4, seed=len(pending))
        pending.append((call, await plane.experts.submit(call)))
        await until(lambda: plane.router.counters.calls == calls_before + len(pending))
    return pending


@pytest.mark.usefixtures("equal_speeds")
async def test_calls_under_way_on_a_frozen_replica_are_hedged(
    tmp_path: Path, replica_process: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = replica_process
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        (survivor,) = plane.servers
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address, survivor]]))
        for seed in range(20):
            await _assert_exact(plane, seed)
        router, frozen = plane.router, _link(plane, address)
        pending = await _freeze(plane, process, address)
        # Long before the connection is taken for dead.
        async with asyncio.timeout(rpc.KEEPALIVE_TIMEOUT_MS / 1000 / 3):
            for call, sums in pending:
                assert torch.equal(await sums, plane.expected(call))
            assert frozen.is_suspect(asyncio.get_running_loop().time())
            assert router.counters.hedges_won >= 1
            assert frozen.overdue_calls >= 1
            # Nobody else has to wait for it.
            calls_before = frozen.calls
            for seed in range(20):
                await _assert_exact(plane, seed)
            assert frozen.calls == calls_before
        os.kill(process.pid, signal.SIGCONT)
        async with asyncio.timeout(30):
            await until(lambda: not frozen.outstanding_pairs)  # what it owed is the probe
            while frozen.calls == calls_before:
                await _assert_exact(plane)
        assert (router.counters.failed_calls, frozen.breaks, frozen.wrong_answers) == (0, 0, 0)


@pytest.mark.slow
async def test_a_frozen_replica_is_taken_for_dead_in_the_end(
    tmp_path: Path, replica_process: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = replica_process
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        (survivor,) = plane.servers
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address, survivor]]))
        for call, sums in await _freeze(plane, process, address):
            assert torch.equal(await sums, plane.expected(call))
        frozen = _link(plane, address)
        noticed_ms = rpc.KEEPALIVE_INTERVAL_MS + rpc.KEEPALIVE_TIMEOUT_MS
        await until(lambda: frozen.breaks == 1, noticed_ms / 1000 + 15)
        assert (frozen.connected, frozen.outstanding_pairs) == (False, 0)


async def test_a_frozen_replica_that_is_the_only_one_is_waited_for(
    tmp_path: Path, replica_process: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = replica_process
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address]]))
        await _assert_exact(plane)
        pending = await _freeze(plane, process, address)
        now = asyncio.get_running_loop().time
        await until(lambda: _link(plane, address).is_suspect(now()))
        pending.append((call := random_call(3), await plane.experts.submit(call)))
        await until(lambda: _link(plane, address).calls == 3)  # it is used, suspect or not
        os.kill(process.pid, signal.SIGCONT)
        async with asyncio.timeout(30):
            for call, sums in pending:
                assert torch.equal(await sums, plane.expected(call))
        assert plane.router.counters.hedged_parts == 0


@asynccontextmanager
async def _one_of_two_scripted(
    directory: Path,
) -> AsyncIterator[tuple[DispatchPlane, ScriptedExpert, ReplicaLink]]:
    """A plane whose one group has two exact replicas, of which one can be made slow."""
    scripted = ScriptedExpert(_exact)
    async with (
        dispatch_plane(directory, num_groups=1) as plane,
        scripted.serving(f"unix:{directory}/scripted.sock") as address,
        asyncio.timeout(55),
    ):
        (other,) = plane.servers
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address, other]]))
        for seed in range(40):
            await _assert_exact(plane, seed)
        link = _link(plane, address)
        assert link.calls > 10
        yield plane, scripted, link
        assert plane.router.counters.failed_calls == 0


@pytest.mark.usefixtures("no_hedges")
async def test_a_slow_replica_is_only_probed_until_it_is_not_slow(tmp_path: Path) -> None:
    async with _one_of_two_scripted(tmp_path) as (plane, scripted, link):

        def num_chosen() -> int:
            return link.calls - plane.router.counters.probe_parts

        scripted.delay_seconds = 0.1
        num_passed_over = 0
        while num_passed_over < 20 or not plane.router.counters.probe_parts:
            before = num_chosen()
            await _assert_exact(plane)
            num_passed_over = 0 if num_chosen() > before else num_passed_over + 1
        scripted.delay_seconds = 0.0
        before = num_chosen()
        while num_chosen() < before + 10:
            await _assert_exact(plane)


@pytest.mark.slow
async def test_a_slow_replica_holds_up_nobody(tmp_path: Path) -> None:
    async with _one_of_two_scripted(tmp_path) as (plane, scripted, _):
        counters = plane.router.counters
        # Many times what a crossing takes, so that whoever waited for it is told apart.
        scripted.delay_seconds = 0.5
        durations: list[float] = []
        while counters.probe_parts < 2 or len(durations) < 1000:
            started = time.monotonic()
            await _assert_exact(plane)
            durations.append(time.monotonic() - started)
        assert sorted(durations)[int(0.99 * len(durations))] < scripted.delay_seconds / 2
        assert counters.hedges_won >= 1
        copies = counters.hedged_parts + counters.probe_parts
        assert copies <= HEDGE_BURST + HEDGE_SHARE * counters.calls


async def test_crossings_wait_for_the_last_replica_of_a_group(
    tmp_path: Path, replica_process: tuple[subprocess.Popen[str], str]
) -> None:
    process, address = replica_process
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address]]))
        await _assert_exact(plane)
        os.kill(process.pid, signal.SIGSTOP)  # so that it dies with calls under way
        calls = [random_call(4, layer=seed % 3, seed=seed) for seed in range(6)]
        pending = [await plane.experts.submit(call) for call in calls[:3]]
        await until(lambda: plane.router.num_under_way == 3)
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: plane.router.num_waiting == 3)
        pending += [await plane.experts.submit(call) for call in calls[3:]]
        await until(lambda: plane.router.num_waiting == 6)
        # It comes back at its address: the router finds it by itself.
        _, server = await start_replica(address, range(8))
        async with asyncio.timeout(30), server:
            for call, sums in zip(calls, pending, strict=True):
                assert torch.equal(await sums, plane.expected(call))
        assert (plane.router.counters.failed_calls, plane.router.num_waiting) == (0, 0)


async def test_crossings_that_wait_take_a_new_table_at_once(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, num_groups=2) as plane:
        lost, kept = plane.servers
        await plane.servers[lost].stop(grace_seconds=0.0)
        call = random_call(5)
        sums = await plane.experts.submit(call)
        await until(lambda: plane.router.num_waiting == 1)
        # Published in two steps: first the loss, then what takes its place, beside an absent one.
        groups = [list(range(4)), list(range(4, 8))]
        async with asyncio.timeout(5):
            await plane.router.update(table_of(2, groups, [[], [kept]]))
        assert not sums.done()
        new, absent = f"unix:{tmp_path}/new.sock", f"unix:{tmp_path}/absent.sock"
        _, server = await start_replica(new, range(4))
        updating = asyncio.create_task(
            plane.router.update(table_of(3, groups, [[absent, new], [kept]]))
        )
        async with asyncio.timeout(30), server:
            assert torch.equal(await sums, plane.expected(call))
            assert not updating.done()  # it still waits for the absent one
            # A newer table is not held up by that.
            assert await plane.router.update(table_of(4, groups, [[new], [kept]])) == ()
            await _assert_exact(plane)
            updating.cancel()


async def test_a_new_table_does_not_take_away_what_works(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        new = f"unix:{tmp_path}/new.sock"
        updating = asyncio.create_task(plane.router.update(table_of(2, EVERY_EXPERT, [[new]])))
        await _assert_exact(plane)
        assert plane.router.table.epoch == 1  # for nobody listens at the new address
        _, server = await start_replica(new, range(8))
        async with asyncio.timeout(30), server:
            assert await updating == ()
            assert plane.router.table.epoch == 2
            await _assert_exact(plane)
        assert plane.router.counters.failed_calls == 0


async def test_a_group_that_stays_without_a_replica_fails_its_crossings_by_name(
    tmp_path: Path,
) -> None:
    async with dispatch_plane(tmp_path, num_groups=2, replica_wait_seconds=0.05) as plane:
        lost = next(iter(plane.servers))
        await plane.servers[lost].stop(grace_seconds=0.0)
        with pytest.raises(ExpertsUnavailable, match=f"group of experts 0-3 on {lost}"):
            await _assert_exact(plane)
        with pytest.raises(DeadlineExceeded):
            await (await plane.experts.submit(random_call(5), timeout_seconds=0.02))
        await until(lambda: not plane.router.num_under_way)
        assert plane.router.num_waiting == 0


async def test_draining_a_replica_loses_no_call(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, replicas_per_group=2) as plane:
        stopped = asyncio.Event()

        async def cross() -> int:
            num_crossings = 0
            while not stopped.is_set() or num_crossings < 5:
                await _assert_exact(plane, seed=num_crossings)
                num_crossings += 1
            return num_crossings

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(cross())
            await asyncio.sleep(0.05)
            await next(iter(plane.servers.values())).stop()
            stopped.set()
        assert plane.router.counters.failed_calls == 0


def _short(message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
    return expert_pb2.ExpertOutputs(call_id=message.call_id, pair_rows=b"123")


def _damaged(message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
    answer = _exact(message)
    answer.pair_rows = b"\x01" + answer.pair_rows[1:]
    return answer


def _exact(message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
    pair_rows = _scripted_replica().compute(wire.decode_expert_rows(message))
    return wire.encode_expert_outputs(message.call_id, pair_rows)


@functools.cache
def _scripted_replica() -> ExpertReplica:
    return ExpertReplica("scripted", seeded_bank(range(8)))


def _call_came_damaged(message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
    error = wire.encode_error(wire.DamagedCall("checksum of the call"))
    return expert_pb2.ExpertOutputs(call_id=message.call_id, error=error)


def _refusal(message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
    full = tensor_pb2.CallError(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
    return expert_pb2.ExpertOutputs(call_id=message.call_id, error=full)


@pytest.mark.usefixtures("no_hedges", "equal_speeds")
@pytest.mark.parametrize(
    ("reply", "reason", "num_wrong"),
    [
        (_short, "answered wrongly: pair_rows", 1),
        (_damaged, "answered wrongly: checksum of pair_rows", 1),
        (_call_came_damaged, "checksum of the call", 0),
        (_refusal, "full", 0),
    ],
)
async def test_a_wrong_answer_or_a_refusal_sends_the_rows_elsewhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reply: Callable[[expert_pb2.ExpertRows], expert_pb2.ExpertOutputs],
    reason: str,
    num_wrong: int,
) -> None:
    monkeypatch.setattr(replica_link, "WRONG_ANSWER_PAUSE_SECONDS", 60.0)
    scripted = ScriptedExpert(reply)
    async with (
        dispatch_plane(tmp_path, num_groups=1, replica_wait_seconds=0.2) as plane,
        scripted.serving(f"unix:{tmp_path}/bad.sock") as bad,
    ):
        await _assert_exact(plane)  # now the good one has had more pairs: the other goes first
        good = next(iter(plane.servers))
        await plane.router.update(table_of(2, EVERY_EXPERT, [[bad, good]]))
        await _assert_exact(plane)
        assert (scripted.num_calls, plane.router.counters.resent_parts) == (1, 1)
        assert _link(plane, bad).wrong_answers == num_wrong
        if num_wrong:
            for seed in range(4):
                await _assert_exact(plane, seed)
            assert scripted.num_calls == 1  # it is passed over for a while
        await plane.router.update(table_of(3, EVERY_EXPERT, [[bad]]))
        with pytest.raises(ExpertsUnavailable, match=f"{bad}.*{reason}"):
            await _assert_exact(plane)


async def test_a_call_id_used_twice_fails_alone(tmp_path: Path) -> None:
    scripted = ScriptedExpert(_exact)
    async with (
        dispatch_plane(tmp_path, num_groups=1) as plane,
        scripted.serving(f"unix:{tmp_path}/scripted.sock") as address,
        rpc.channel(plane.router_server.address) as channel,
    ):
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address]]))
        scripted.may_answer.clear()  # the first call is under way until the second has its answer
        stream = router_pb2_grpc.RouterStub(channel).Dispatch()
        await stream.initial_metadata()
        call = random_call(5)
        rows = LayerRows(0, call.rows.numpy(), call.expert_ids.numpy(), call.weights.numpy())
        for _ in range(2):
            await stream.write(wire.encode_layer_rows(1, rows, None))
        codes = [(await stream.read()).error.code]
        scripted.may_answer.set()
        codes += [(await stream.read()).error.code]
        assert codes == [grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.OK.value[0]]
        stream.cancel()
        await _assert_exact(plane)  # the links to the replicas are whole


@pytest.mark.usefixtures("no_hedges", "equal_speeds")
async def test_replicas_of_a_group_share_the_load(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, num_groups=1, replicas_per_group=2) as plane:
        for seed in range(10):
            await _assert_exact(plane, seed)
        assert sorted(link.calls for link in plane.router.links) == [5, 5]


async def test_a_new_table_takes_new_calls_while_old_ones_finish_where_they_are(
    tmp_path: Path,
) -> None:
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        (old,) = plane.servers
        (old_link,) = plane.router.links
        new = f"unix:{tmp_path}/new.sock"
        _, new_server = await start_replica(new, range(8))
        async with new_server:
            first_call, second_call = random_call(4, seed=1), random_call(4, seed=2)
            first = await plane.experts.submit(first_call)
            missing = await plane.router.update(table_of(2, EVERY_EXPERT, [[new]]))
            assert missing == ()
            second = await plane.experts.submit(second_call)
            assert torch.equal(await first, plane.expected(first_call))
            assert torch.equal(await second, plane.expected(second_call))
            assert [link.address for link in plane.router.links] == [new]
            assert plane.replicas[old].counters.calls == 1
            await until(lambda: old_link.closed)


@pytest.mark.usefixtures("no_hedges")
async def test_an_epoch_has_retired_once_nothing_is_out_that_was_sent_before_it(
    tmp_path: Path,
) -> None:
    slow = ScriptedExpert(_exact)
    async with (
        dispatch_plane(tmp_path, num_groups=1) as plane,
        slow.serving(f"unix:{tmp_path}/slow.sock") as address,
    ):
        await plane.router.retired(1)
        slow.may_answer.clear()
        await plane.router.update(table_of(2, EVERY_EXPERT, [[address]]))
        call = random_call(4)
        sums = await plane.experts.submit(call)
        await until(lambda: slow.num_calls == 1)
        retired = asyncio.create_task(plane.router.retired(3))
        await asyncio.sleep(0.01)
        await plane.router.update(table_of(3, EVERY_EXPERT, [list(plane.servers)]))
        await asyncio.sleep(0.01)
        assert not retired.done()  # what was sent under epoch 2 is out
        later = random_call(4, seed=1)
        assert torch.equal(await (await plane.experts.submit(later)), plane.expected(later))
        assert not retired.done()
        slow.may_answer.set()
        assert torch.equal(await sums, plane.expected(call))
        await retired
        sums = await plane.experts.submit(call)
        sums.cancel()
        await plane.router.update(table_of(4, EVERY_EXPERT, [list(plane.servers)]))
        await plane.router.retired(4)  # a crossing that was given up is waited for by nobody


async def test_rows_for_an_expert_that_moved_meanwhile_go_where_it_is(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, num_groups=1, replicas_per_group=2) as plane:
        first, _ = plane.replicas.values()
        first.drop([3])  # the table does not say so yet
        for seed in range(10):
            await _assert_exact(plane, seed)
        assert plane.router.counters.resent_parts > 0


async def test_an_epoch_that_is_not_newer_is_refused(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        with pytest.raises(ValueError, match="epoch 1 is not above epoch 1 in use"):
            await plane.router.update(plane.router.table)


async def test_a_table_for_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path) as plane:
        with pytest.raises(ValueError, match="epoch 2 has 4 experts, epoch 1 in use has 8"):
            await plane.router.update(RoutingTable.of(2, [()] * 4))
        await _assert_exact(plane)


async def test_an_update_reports_replicas_that_do_not_answer_and_serves_the_rest(
    tmp_path: Path,
) -> None:
    async with dispatch_plane(tmp_path, num_groups=1) as plane:
        absent = f"unix:{tmp_path}/absent.sock"
        (present,) = plane.servers
        missing = await plane.router.update(
            table_of(2, EVERY_EXPERT, [[absent, present]]), connect_timeout_seconds=0.05
        )
        assert missing == (absent,)
        await _assert_exact(plane)


async def test_stats_report_table_load_and_replicas(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, num_groups=2) as plane:
        await _assert_exact(plane)
        async with rpc.channel(plane.router_server.address) as channel:
            stats = await router_pb2_grpc.RouterStub(channel).Stats(router_pb2.RouterStatsRequest())
        assert (stats.router, stats.epoch, stats.calls, stats.rows) == ("router-0", 1, 1, 5)
        assert (stats.failed_calls, stats.resent_parts, stats.calls_under_way) == (0, 0, 0)
        assert [replica.address for replica in stats.replicas] == sorted(plane.servers)
        assert sum(replica.pairs for replica in stats.replicas) == 10
        assert all(replica.connected for replica in stats.replicas)
        assert not any(replica.suspect for replica in stats.replicas)
        assert (stats.calls_waiting, stats.hedged_parts, stats.hedges_won) == (0, 0, 0)
        assert [sum(replica.answer_seconds.counts) for replica in stats.replicas] == [1, 1]
        asked_for = torch.bincount(random_call(5).expert_ids.reshape(-1), minlength=8)
        assert list(stats.expert_pairs) == asked_for.tolist()


async def test_a_group_without_replicas_fails_by_name(tmp_path: Path) -> None:
    async with dispatch_plane(tmp_path, replica_wait_seconds=0.05) as plane:
        await plane.router.update(table_of(2, EVERY_EXPERT, [[]]))
        with pytest.raises(ExpertsUnavailable, match="group of experts 0-7 on -"):
            await _assert_exact(plane)
