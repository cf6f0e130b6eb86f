"""What is done with sessions between turns: a gateway, two workers and a KV store, all real."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import xxhash

from protos import attention_pb2, control_pb2, inference_pb2, kvstore_pb2, sessions_pb2
from services.gateway.store import StoreAddress
from services.kvstore.config import KvStoreConfig
from services.kvstore.disk import DiskConfig
from services.kvstore.server import KvStoreServer
from services.session_record import packed
from tests.services import tiny_model
from tests.services.gateway.deployed import Deployment, deployed, failure, frame, request

PROMPT = tiny_model.prompt(260)
BLOCKS_TOKENS = 256
NAME = sessions_pb2.SessionName(session_id="tea")


@asynccontextmanager
async def kv_store(disk: Path | None) -> AsyncIterator[KvStoreServer]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as arena_dir:
        server = await KvStoreServer.open(
            KvStoreConfig(
                name="kvstore-0",
                arena_dir=Path(arena_dir),
                ram_bytes=2**22,
                disk=None if disk is None else DiskConfig(disk / "blobs", 2**24),
                sessions_dir=disk,
            )
        )
        try:
            yield server
        finally:
            await server.stop(5)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[KvStoreServer]:
    async with kv_store(tmp_path) as server:
        yield server
        server.check()


@pytest.fixture
async def deployment(tmp_path: Path, store: KvStoreServer) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path, StoreAddress("kvstore-0", store.address)) as running:
        yield running


@pytest.fixture
async def memory() -> AsyncIterator[KvStoreServer]:
    """A store that has nothing below its RAM."""
    async with kv_store(None) as server:
        yield server


@pytest.fixture
async def without_disk(tmp_path: Path, memory: KvStoreServer) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path, StoreAddress("kvstore-0", memory.address)) as running:
        yield running


async def say(
    deployment: Deployment, prompt: tuple[int, ...], name: sessions_pb2.SessionName = NAME
) -> inference_pb2.GenerateResponse:
    asked = request(prompt, max_tokens=4, ignore_eos=True)
    asked.session_id, asked.cache_salt = name.session_id, name.cache_salt
    answer: inference_pb2.GenerateResponse = await deployment.inference.Generate(asked)
    return answer


async def written_back(deployment: Deployment, store: KvStoreServer) -> None:
    """Whatever is on its way from the workers to the store, and from its memory to disk."""
    async with asyncio.timeout(10):
        engines = [worker.engine for worker in deployment.workers]
        while any(engine.stats().kv.waiting_blobs for engine in engines):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await store.store.flush()


async def shown(deployment: Deployment) -> sessions_pb2.ShowSessionResponse:
    answer: sessions_pb2.ShowSessionResponse = await deployment.sessions.Show(
        sessions_pb2.ShowSessionRequest(name=NAME, with_history=True)
    )
    return answer


async def test_a_session_is_listed_and_shown(deployment: Deployment, store: KvStoreServer) -> None:
    answer = await say(deployment, PROMPT)
    await say(deployment, (5, 6), sessions_pb2.SessionName(session_id="coffee"))
    await say(deployment, (5, 6), sessions_pb2.SessionName(session_id="tea", cache_salt="mine"))
    listed = await deployment.sessions.List(sessions_pb2.ListSessionsRequest())
    assert [session.session_id for session in listed.sessions] == ["coffee", "tea"]
    newest = await deployment.sessions.List(sessions_pb2.ListSessionsRequest(max_sessions=1))
    assert [session.session_id for session in newest.sessions] == ["coffee"]
    mine = await deployment.sessions.List(sessions_pb2.ListSessionsRequest(cache_salt="mine"))
    assert [session.num_tokens for session in mine.sessions] == [6]

    await written_back(deployment, store)
    tea = await shown(deployment)
    assert (tea.session.num_tokens, tea.session.version) == (len(PROMPT) + 4, 1)
    assert tea.session.worker == answer.worker
    assert not tea.session.in_turn
    assert tea.kv == sessions_pb2.SessionKv(ram_tokens=BLOCKS_TOKENS, missing_tokens=8)
    assert list(tea.token_ids) == [*PROMPT, *answer.token_ids]
    assert tea.text == deployment.tokenizer.decode(tea.token_ids)


async def test_evicted_kv_is_prefetched(deployment: Deployment, store: KvStoreServer) -> None:
    await say(deployment, PROMPT)
    await written_back(deployment, store)
    everything = control_pb2.EvictKvRequest(tier=kvstore_pb2.KV_TIER_RAM, bytes=2**22)
    evicted = await deployment.control.EvictKv(everything)
    assert evicted.stores[0].evicted.freed_bytes > 0
    kv = (await shown(deployment)).kv
    assert kv == sessions_pb2.SessionKv(disk_tokens=BLOCKS_TOKENS, missing_tokens=8)
    prefetched = await deployment.sessions.Prefetch(sessions_pb2.PrefetchSessionRequest(name=NAME))
    assert prefetched.kv == sessions_pb2.SessionKv(ram_tokens=BLOCKS_TOKENS, missing_tokens=8)


async def test_pinned_kv_stays_while_the_rest_goes(
    without_disk: Deployment, memory: KvStoreServer
) -> None:
    deployment, store = without_disk, memory
    await say(deployment, PROMPT)
    other = sessions_pb2.SessionName(session_id="other")
    await say(deployment, tiny_model.prompt(260, seed=1), other)
    await written_back(deployment, store)
    pinned = await deployment.sessions.Pin(sessions_pb2.PinSessionRequest(name=NAME, seconds=60))
    assert pinned.session.pinned_until_unix_seconds > pinned.session.last_used_unix_seconds
    everything = control_pb2.EvictKvRequest(tier=kvstore_pb2.KV_TIER_RAM, bytes=2**22)
    await deployment.control.EvictKv(everything)
    assert (await shown(deployment)).kv.ram_tokens == BLOCKS_TOKENS
    of_other = sessions_pb2.ShowSessionRequest(name=other)
    assert (await deployment.sessions.Show(of_other)).kv.ram_tokens == 0

    unpinned = await deployment.sessions.Unpin(sessions_pb2.UnpinSessionRequest(name=NAME))
    assert unpinned.session.pinned_until_unix_seconds == 0
    await deployment.control.EvictKv(everything)
    assert (await shown(deployment)).kv.ram_tokens == 0


async def test_a_pin_covers_the_turns_that_follow(
    without_disk: Deployment, memory: KvStoreServer
) -> None:
    deployment, store = without_disk, memory
    await say(deployment, PROMPT[:130])
    await deployment.sessions.Pin(sessions_pb2.PinSessionRequest(name=NAME, seconds=60))
    await say(deployment, PROMPT[130:])
    await written_back(deployment, store)
    everything = control_pb2.EvictKvRequest(tier=kvstore_pb2.KV_TIER_RAM, bytes=2**22)
    await deployment.control.EvictKv(everything)
    assert (await shown(deployment)).kv.ram_tokens == BLOCKS_TOKENS


async def test_released_blocks_leave_the_device_and_come_back_from_memory(
    deployment: Deployment, store: KvStoreServer
) -> None:
    await say(deployment, PROMPT)
    await written_back(deployment, store)
    released = await deployment.sessions.Release(sessions_pb2.ReleaseSessionRequest(name=NAME))
    assert released.blocks == 2
    again = await deployment.sessions.Release(sessions_pb2.ReleaseSessionRequest(name=NAME))
    assert again.blocks == 0
    answer = await say(deployment, (7,))
    assert answer.usage.kv.device_tokens == 0
    assert answer.usage.kv.ram_tokens + answer.usage.kv.computed_tokens == len(PROMPT) + 5


@pytest.mark.parametrize("with_kv", [False, True])
async def test_a_deleted_session_begins_anew(
    deployment: Deployment, store: KvStoreServer, with_kv: bool
) -> None:
    await say(deployment, PROMPT)
    await written_back(deployment, store)
    keys = (await deployment.sessions.Show(sessions_pb2.ShowSessionRequest(name=NAME))).kv
    assert keys.ram_tokens == BLOCKS_TOKENS
    asked = sessions_pb2.DeleteSessionRequest(name=NAME, with_kv=with_kv)
    await deployment.sessions.Delete(asked)
    listed = await deployment.sessions.List(sessions_pb2.ListSessionsRequest())
    assert list(listed.sessions) == []
    error = await failure(deployment.sessions.Delete(asked))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.NOT_FOUND,
        "there is no session 'tea'",
    )
    answer = await say(deployment, PROMPT)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.kv.computed_tokens == (len(PROMPT) if with_kv else 4)


async def test_a_session_moves_to_another_deployment(
    deployment: Deployment, store: KvStoreServer, tmp_path: Path
) -> None:
    first = await say(deployment, PROMPT)
    await written_back(deployment, store)
    parts = [
        part
        async for part in deployment.sessions.Export(sessions_pb2.ExportSessionRequest(name=NAME))
    ]
    assert parts[0].history.token_ids == [*PROMPT, *first.token_ids]
    assert len(parts) > 2
    folder = tmp_path / "there"
    folder.mkdir()
    async with (
        kv_store(None) as there,
        deployed(folder, StoreAddress("kvstore-0", there.address)) as elsewhere,
    ):
        imported = await elsewhere.sessions.Import(import_of(parts))
        assert imported.session.num_tokens == len(PROMPT) + 4
        assert (imported.kept_blobs, imported.refused_blobs) == (len(parts) - 1, 0)
        assert (await shown(elsewhere)).kv.ram_tokens == BLOCKS_TOKENS
        moved, stayed = await say(elsewhere, (7, 8)), await say(deployment, (7, 8))
        assert moved.token_ids == stayed.token_ids
        assert moved.usage.prompt_tokens == stayed.usage.prompt_tokens
        error = await failure(elsewhere.sessions.Import(import_of(parts)))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS


def import_of(parts: list[Any]) -> AsyncIterator[sessions_pb2.ImportSessionRequest]:
    async def requests() -> AsyncIterator[sessions_pb2.ImportSessionRequest]:
        begin = sessions_pb2.ImportSession(name=NAME, history=parts[0].history)
        yield sessions_pb2.ImportSessionRequest(session=begin)
        for part in parts[1:]:
            yield sessions_pb2.ImportSessionRequest(blob=part.blob)

    return requests()


async def test_a_damaged_blob_is_not_imported(deployment: Deployment, store: KvStoreServer) -> None:
    await say(deployment, PROMPT)
    await written_back(deployment, store)
    export = deployment.sessions.Export(sessions_pb2.ExportSessionRequest(name=NAME))
    parts = [part async for part in export]
    await deployment.sessions.Delete(sessions_pb2.DeleteSessionRequest(name=NAME, with_kv=True))
    data = bytearray(parts[1].blob.data)
    data[-1] ^= 1
    parts[1].blob.data = bytes(data)
    imported = await deployment.sessions.Import(import_of(parts))
    assert (imported.kept_blobs, imported.refused_blobs) == (len(parts) - 2, 1)
    assert (await shown(deployment)).kv.missing_tokens == 128 + 8


async def test_an_import_is_checked(deployment: Deployment) -> None:
    for token_ids, words in (
        ((), "the history has 0 tokens"),
        ((4096,), "token id 4096 in the history"),
        (tiny_model.prompt(400), "the history has 400 tokens, a session here 1 to 399"),
    ):
        checksum = xxhash.xxh3_128_digest(packed(token_ids))
        history = sessions_pb2.SessionHistory(token_ids=token_ids, checksum=checksum)
        part = sessions_pb2.ExportSessionResponse(history=history)
        error = await failure(deployment.sessions.Import(import_of([part])))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(error.details())


async def test_a_damaged_history_is_not_imported(deployment: Deployment) -> None:
    await say(deployment, (5, 6))
    export = deployment.sessions.Export(sessions_pb2.ExportSessionRequest(name=NAME))
    parts = [part async for part in export]
    await deployment.sessions.Delete(sessions_pb2.DeleteSessionRequest(name=NAME))
    parts[0].history.token_ids[1] ^= 1
    error = await failure(deployment.sessions.Import(import_of(parts)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "checksum" in str(error.details())


async def test_a_session_in_a_turn_says_so_and_is_not_changed(deployment: Deployment) -> None:
    await say(deployment, (5, 6))
    asked = request((7,), max_tokens=300, ignore_eos=True)
    asked.session_id = "tea"
    call = deployment.inference.GenerateStream(asked)
    await frame(call, "accepted")
    assert (await shown(deployment)).session.in_turn
    for change in (
        deployment.sessions.Delete(sessions_pb2.DeleteSessionRequest(name=NAME)),
        deployment.sessions.Pin(sessions_pb2.PinSessionRequest(name=NAME, seconds=1)),
        deployment.sessions.Unpin(sessions_pb2.UnpinSessionRequest(name=NAME)),
    ):
        error = await failure(change)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    call.cancel()


async def test_a_session_that_nobody_began(deployment: Deployment) -> None:
    for call in (
        deployment.sessions.Show(sessions_pb2.ShowSessionRequest(name=NAME)),
        deployment.sessions.Pin(sessions_pb2.PinSessionRequest(name=NAME, seconds=1)),
        deployment.sessions.Prefetch(sessions_pb2.PrefetchSessionRequest(name=NAME)),
        deployment.sessions.Release(sessions_pb2.ReleaseSessionRequest(name=NAME)),
        deployment.sessions.Export(sessions_pb2.ExportSessionRequest(name=NAME)),
    ):
        assert (await failure(call)).code() is grpc.StatusCode.NOT_FOUND
    error = await failure(deployment.sessions.Show(sessions_pb2.ShowSessionRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_operators_see_and_check_the_tiers(
    deployment: Deployment, store: KvStoreServer
) -> None:
    await say(deployment, PROMPT)
    await written_back(deployment, store)
    stats = await deployment.control.GetKvStats(control_pb2.GetKvStatsRequest())
    [of_store] = stats.stores
    tiers = {tier.tier: tier for tier in of_store.stat.tiers}
    assert tiers[kvstore_pb2.KV_TIER_RAM].blobs >= 3
    assert tiers[kvstore_pb2.KV_TIER_DISK].blobs >= 3
    assert [worker.stat.asked_tokens for worker in stats.workers] == [len(PROMPT), 0]
    assert isinstance(stats.workers[0].stat, attention_pb2.AttentionKvStats)
    for tier in (kvstore_pb2.KV_TIER_RAM, kvstore_pb2.KV_TIER_DISK):
        verified = await deployment.control.VerifyKv(control_pb2.VerifyKvRequest(tier=tier))
        assert verified.stores[0].verified.blobs == tiers[tier].blobs
        assert not verified.stores[0].verified.damaged
    cold = control_pb2.VerifyKvRequest(tier=kvstore_pb2.KV_TIER_COLD)
    off = await deployment.control.VerifyKv(cold)
    assert "COLD" in off.stores[0].unavailable
    collected = await deployment.control.CollectKv(control_pb2.CollectKvRequest())
    assert collected.stores[0].WhichOneof("outcome") == "collected"


async def test_a_store_that_is_gone_says_so_in_its_place(
    deployment: Deployment, store: KvStoreServer
) -> None:
    await store.stop(0)
    stats = await deployment.control.GetKvStats(control_pb2.GetKvStatsRequest())
    assert stats.stores[0].unavailable.startswith("KV store kvstore-0: ")
    assert stats.workers[0].WhichOneof("outcome") == "stat"
    error = await failure(deployment.sessions.List(sessions_pb2.ListSessionsRequest()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
