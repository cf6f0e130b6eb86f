"""Restored or computed: tokens and logits are those of a run with everything resident, bit for bit.

The block store is one in memory with real, verified blobs.
"""

import asyncio
import random

import pytest

from services.attention.cost_model import Source
from services.attention.kv_cache import KvCacheConfig
from services.errors import Draining
from services.generation import KvUsage
from services.kvstore.tier import Tier, TierCost
from tests.services import tiny_model
from tests.services.attention.kv_worker import BLOCK, Worker, prompt_of
from tests.services.attention.memory_store import MemoryStore
from tests.services.attention.resident import answer

WHOLE_PROMPT = 2000  # of 15 whole blocks that can be restored


async def test_a_second_prompt_shares_the_blocks_on_the_device() -> None:
    prompt = prompt_of(WHOLE_PROMPT)
    async with Worker(has_store=False).running() as worker:
        first = await worker.ask(prompt)
        again = await worker.ask(prompt)
        longer = await worker.ask(prompt[:1100] + prompt_of(300, seed=2))
        other = await worker.ask(prompt_of(300, seed=3))
    assert first == KvUsage(computed_tokens=WHOLE_PROMPT)
    assert again == KvUsage(device_tokens=1920, computed_tokens=80)
    assert longer == KvUsage(device_tokens=1024, computed_tokens=376)  # 1024: a resume point
    assert other == KvUsage(computed_tokens=300)


@pytest.mark.slow
async def test_what_the_device_gave_up_comes_back_from_the_store() -> None:
    prompt = prompt_of(WHOLE_PROMPT)
    async with Worker().running() as worker:
        await worker.ask(prompt, num_tokens=140)  # decodes over a boundary: 2048
        await worker.forget_device()
        history = prompt + answer(prompt, 140).token_ids
        turn = history + prompt_of(30, seed=2)
        assert await worker.ask(turn) == KvUsage(ram_tokens=2048, computed_tokens=122)
        await worker.forget_device()
        elsewhere = Worker(store=worker.store)
        async with elsewhere.running():
            usage = await elsewhere.ask(turn + prompt_of(200, seed=3), num_tokens=2)
            assert usage == KvUsage(ram_tokens=2048, computed_tokens=322)


async def filled_store(prompt: tuple[int, ...]) -> MemoryStore:
    async with Worker().running() as worker:
        await worker.ask(prompt)
    return worker.store


async def restored(store: MemoryStore, prompt: tuple[int, ...]) -> KvUsage:
    """By a worker that holds nothing."""
    async with Worker(store=store).running() as worker:
        return await worker.ask(prompt)


@pytest.mark.parametrize(
    ("damaged", "num_computed"),
    [
        ((), 0),
        ((9,), 2),  # resumes at block 8, computes 8 and 9, and jumps to the last boundary
        ((14,), 3),
        ((1, 6, 14), 2 + 3 + 3),
        ((0, 3, 4, 7, 8, 11, 12), 4 + 4 + 4 + 1),
    ],
)
async def test_damaged_blocks_are_computed_again_and_nothing_else(
    damaged: tuple[int, ...], num_computed: int
) -> None:
    prompt, draw = prompt_of(WHOLE_PROMPT), random.Random(1)
    store = await filled_store(prompt)
    bodies, whole = store.bodies(), set(store.blobs)
    assert len(bodies) == 15
    for index in damaged:
        store.damage(bodies[index], draw)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=(15 - num_computed) * BLOCK, computed_tokens=num_computed * BLOCK + 80
    )
    assert set(store.blobs) == whole  # what was computed again is kept again
    assert await restored(store, prompt) == KvUsage(ram_tokens=1920, computed_tokens=80)


async def test_tails_that_are_gone_cost_the_way_from_the_one_before() -> None:
    prompt, draw = prompt_of(WHOLE_PROMPT), random.Random(1)
    store = await filled_store(prompt)
    tails = store.tails()
    assert len(tails) == 4  # after 4, 8 and 12 blocks, and after 15
    store.damage(tails[-1], draw)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=12 * BLOCK, computed_tokens=3 * BLOCK + 80
    )
    for tail in tails[1:]:
        store.damage(tail, draw)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=4 * BLOCK, computed_tokens=11 * BLOCK + 80
    )


async def test_prompts_with_another_salt_share_nothing() -> None:
    prompt = prompt_of(700)
    async with Worker().running() as worker:
        await worker.ask(prompt, salt="one")
        assert await worker.ask(prompt, salt="other") == KvUsage(computed_tokens=700)
        await worker.forget_device()
        assert await worker.ask(prompt) == KvUsage(computed_tokens=700)
        assert await worker.ask(prompt, salt="one") == KvUsage(ram_tokens=640, computed_tokens=60)


async def test_what_is_faster_to_compute_is_not_loaded_and_counted() -> None:
    prompt = prompt_of(700)
    store = await filled_store(prompt)
    store.known_costs = {Tier.RAM: TierCost(latency_seconds=1e6, bytes_per_second=1.0)}
    async with Worker(store=store).running() as worker:
        assert await worker.ask(prompt) == KvUsage(computed_tokens=700)
        counters = worker.engine.stats().kv.counters
    assert +counters.hit_tokens == {Source.RAM: 640}
    assert (counters.skipped_tokens, counters.failed_tokens, counters.late_tokens) == (640, 0, 0)


async def test_a_load_that_takes_too_long_is_given_up_with_what_has_come() -> None:
    prompt = prompt_of(WHOLE_PROMPT)
    store = await filled_store(prompt)
    store.delay_s = 0.1  # sixteen blobs of 0.1 s each, and 0.65 s to wait
    kv = KvCacheConfig(resume_every_blocks=4, load_timeout_seconds=0.65)
    async with Worker(store=store, kv=kv).running() as worker:
        usage = await worker.ask(prompt)
        counters = worker.engine.stats().kv.counters
    assert usage == KvUsage(computed_tokens=WHOLE_PROMPT)  # no tail had come
    assert counters.late_tokens == 1920


async def test_others_keep_stepping_while_a_sequence_loads() -> None:
    prompt, other = prompt_of(WHOLE_PROMPT), prompt_of(50, seed=2)
    store = await filled_store(prompt)
    store.load_gate.clear()
    async with Worker(store=store).running() as worker:
        loading = asyncio.create_task(worker.ask(prompt))
        async with asyncio.timeout(30):
            while not store.leases:  # noqa: ASYNC110
                await asyncio.sleep(0)
        for _ in range(3):
            await worker.ask(other)
        assert not loading.done()
        store.load_gate.set()
        assert await loading == KvUsage(ram_tokens=1920, computed_tokens=80)


async def test_far_blocks_are_fetched_from_the_moment_a_request_arrives() -> None:
    prompt = prompt_of(700)
    store = await filled_store(prompt)
    store.tier_of = dict.fromkeys(store.blobs, Tier.DISK)
    async with Worker(store=store, max_sequences=1).running() as worker:
        running = asyncio.create_task(worker.ask(prompt_of(10), num_tokens=30))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(worker.ask(prompt))
        async with asyncio.timeout(30):
            while not set(store.prefetched) >= set(store.bodies()):  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert not running.done()
        await running
        assert await waiting == KvUsage(disk_tokens=640, computed_tokens=60)


async def test_each_tier_is_counted_by_itself() -> None:
    prompt = prompt_of(700)
    store = await filled_store(prompt)
    for key, tier in zip(store.bodies(), (1, 2, 3, 4, 4), strict=True):
        store.tier_of[key] = Tier(tier)
    assert await restored(store, prompt) == KvUsage(
        ram_tokens=128, disk_tokens=128, peer_tokens=128, cold_tokens=256, computed_tokens=60
    )


@pytest.mark.parametrize("when", ["lookup", "load", "save"])
async def test_a_store_that_raises_costs_the_computing(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = prompt_of(700)
    store = await filled_store(prompt)
    async with Worker(store=store).running() as worker:
        if when == "save":
            store.blobs.clear()
            store.gate.clear()
        elif when == "load":
            store.delay_s = 0.02
        else:
            store.error = RuntimeError("boom")
        asking = asyncio.create_task(worker.ask(prompt))
        await asyncio.sleep(0.05)
        store.error = RuntimeError("boom")
        store.gate.set()
        usage = await asking
        store.error = None
        assert usage.computed_tokens >= 700 - 2 * BLOCK
        await worker.written_back()
    told = "write_back_failed" if when == "save" else "kv_"
    assert any(record.message.startswith(told) for record in caplog.records)


async def test_a_bug_behind_a_load_ends_the_engine_and_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = prompt_of(700)
    worker = Worker(store=await filled_store(prompt))

    def boom(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(worker.pool, "write_tail", boom)
    running = asyncio.create_task(worker.engine.run())
    async with asyncio.timeout(10):
        with pytest.raises(Draining):
            await worker.ask(prompt)
        with pytest.raises(ExceptionGroup) as raised:
            await running
    assert raised.group_contains(RuntimeError, match="boom")


@pytest.mark.parametrize("opens", ["while it decodes", "after the end"])
async def test_what_the_write_back_has_no_room_for_is_offered_again_until_the_end(
    opens: str,
) -> None:
    prompt = prompt_of(WHOLE_PROMPT)
    max_bytes = 2 * tiny_model.pool().body_nbytes
    kv = KvCacheConfig(resume_every_blocks=100, max_writeback_bytes=max_bytes)
    async with Worker(kv=kv).running() as worker:
        worker.store.gate.clear()
        asking = asyncio.create_task(worker.ask(prompt, num_tokens=40))
        async with asyncio.timeout(60):
            while worker.engine.stats().counters.completion_tokens < 5:  # noqa: ASYNC110
                await asyncio.sleep(0)
        if opens == "after the end":
            await asking
        worker.store.gate.set()
        await asking
        await worker.written_back()
        counters = worker.engine.stats().kv.counters
    num_bodies, num_tails = (15, 1) if opens == "while it decodes" else (2, 0)
    assert len(worker.store.bodies()) == num_bodies
    assert len(worker.store.tails()) == num_tails
    assert counters.saved_blobs == num_bodies + num_tails
    assert counters.dropped_blobs == 16 - counters.saved_blobs


async def test_idle_blocks_leave_the_device_by_themselves() -> None:
    seconds = 0.0
    kv = KvCacheConfig(idle_seconds=0.2)
    async with Worker(kv=kv, clock=lambda: seconds).running() as worker:
        await worker.ask(prompt_of(700))
        await worker.written_back()
        assert worker.pool.usage().cached_blocks == 5
        seconds = 1.0
        async with asyncio.timeout(30):
            while worker.pool.usage().cached_blocks:  # noqa: ASYNC110 nobody waits for it
                await asyncio.sleep(0.02)
        assert await worker.ask(prompt_of(700)) == KvUsage(ram_tokens=640, computed_tokens=60)


async def test_blocks_whose_saving_failed_are_saved_when_they_are_used_again() -> None:
    prompt = prompt_of(700)
    async with Worker().running() as worker:
        worker.store.error = RuntimeError("boom")
        await worker.ask(prompt)
        await worker.written_back()
        worker.store.error = None
        assert not worker.store.blobs
        longer = prompt + prompt_of(300, seed=2)
        assert await worker.ask(longer) == KvUsage(device_tokens=640, computed_tokens=360)
        await worker.written_back()
        assert len(worker.store.bodies()) == 7
    assert await restored(worker.store, longer) == KvUsage(ram_tokens=896, computed_tokens=104)


async def test_a_released_session_leaves_the_worker_with_its_tails() -> None:
    prompt, draw = prompt_of(700), random.Random(1)
    async with Worker().running() as worker:
        await worker.ask(prompt)
        await worker.forget_all_but_the_store(prompt)
        assert await worker.ask(prompt) == KvUsage(ram_tokens=640, computed_tokens=60)
        await worker.forget_all_but_the_store(prompt)
        for tail in worker.store.tails():
            worker.store.damage(tail, draw)
        assert await worker.ask(prompt) == KvUsage(computed_tokens=700)


async def test_two_requests_that_wait_for_one_damaged_block_both_come_out_right() -> None:
    prompt, draw = prompt_of(WHOLE_PROMPT), random.Random(1)
    store = await filled_store(prompt)
    store.damage(store.bodies()[9], draw)
    # Both load at once, and neither can load what the other has computed.
    store.load_gate.clear()
    store.gate.clear()
    async with Worker(store=store).running() as worker:
        asking = asyncio.gather(worker.ask(prompt), worker.ask(prompt))
        async with asyncio.timeout(30):
            while store.leases < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
        store.load_gate.set()
        usages = await asking
        store.gate.set()
    for usage in usages:
        assert usage == KvUsage(ram_tokens=13 * BLOCK, computed_tokens=2 * BLOCK + 80)


@pytest.mark.parametrize("num_tokens", [127, 128, 129, 255, 256, 257, 1025])
async def test_turns_at_every_side_of_a_boundary(num_tokens: int) -> None:
    history = prompt_of(num_tokens)
    async with Worker().running() as worker:
        for _ in range(3):
            await worker.ask(history, num_tokens=3)
            await worker.forget_device()
            history += answer(history, 3).token_ids
        assert len(worker.store.bodies()) == (len(history) - 1) // BLOCK
