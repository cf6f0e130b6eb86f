"""Turns of sessions through a gateway: real servers all the way, records in a real store."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from protos import control_pb2, inference_pb2
from services.gateway.store import StoreAddress
from tests.services import tiny_model
from tests.services.gateway.deployed import Deployment, deployed, failure, frame, request
from tests.services.session_store import session_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoreAddress]:
    async with session_store("kvstore-0", tmp_path) as row:
        yield row


@pytest.fixture
async def deployment(tmp_path: Path, store: StoreAddress) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path) as running:
        await running.gateway.gateway.sessions.stores.update([store])
        yield running


def turn(
    prompt: str | tuple[int, ...], session_id: str = "tea", *, salt: str = "", max_tokens: int = 8
) -> inference_pb2.GenerateRequest:
    asked = request(prompt, max_tokens=max_tokens, ignore_eos=True)
    asked.session_id, asked.cache_salt = session_id, salt
    return asked


def generated(history: list[int], max_tokens: int = 8) -> list[int]:
    """As one process answers; it ends at an end token, the tests' turns do not."""
    return tiny_model.model().generate(history, max_tokens)


async def test_each_turn_goes_on_from_all_that_was_said(deployment: Deployment) -> None:
    history: list[int] = []
    for prompt in ((5, 6, 7), (9, 10), (11,)):
        answer = await deployment.inference.Generate(turn(prompt))
        history += prompt
        expected = generated(history)
        assert list(answer.token_ids)[: len(expected)] == expected
        assert answer.usage.prompt_tokens == len(history)
        history += answer.token_ids


async def test_a_history_that_was_lost_is_told_and_not_passed_over(
    deployment: Deployment, tmp_path: Path
) -> None:
    first = await deployment.inference.Generate(turn((5, 6, 7)))
    stores = deployment.gateway.gateway.sessions.stores
    (tmp_path / "empty").mkdir()
    async with session_store("kvstore-0", tmp_path / "empty") as another:
        await stores.update([another])
        told = await failure(deployment.inference.Generate(turn((9, 10))))
        assert told.code() is grpc.StatusCode.DATA_LOSS
        assert "'tea' was at version 1, and its record is gone" in (told.details() or "")
        again = await deployment.inference.Generate(turn((9, 10)))  # whoever asks again, knows
        assert again.usage.prompt_tokens == 2
        await deployment.inference.Generate(turn((9, 10), "another"))
        await stores.update([])
    assert len(first.token_ids) == 8


async def test_text_begins_once(deployment: Deployment) -> None:
    encode = deployment.tokenizer.encode
    first = await deployment.inference.Generate(turn("once"))
    second = await deployment.inference.Generate(turn(" upon"))
    assert first.usage.prompt_tokens == len(encode("once"))
    history = [*encode("once"), *first.token_ids, *encode(" upon")[1:]]
    assert second.usage.prompt_tokens == len(history)
    expected = generated(history)
    assert list(second.token_ids)[: len(expected)] == expected


async def test_the_turn_is_recorded_before_final(deployment: Deployment) -> None:
    for i in range(5):
        call = deployment.inference.GenerateStream(turn((5 + i,), max_tokens=2))
        async for message in call:
            if message.WhichOneof("frame") == "final":
                break
        call.cancel()
    answer = await deployment.inference.Generate(turn((5,)))
    assert answer.usage.prompt_tokens == 5 * 3 + 1


async def test_a_session_takes_one_turn_at_a_time(deployment: Deployment) -> None:
    first = deployment.inference.GenerateStream(turn((5,), max_tokens=300))
    await frame(first, "accepted")
    error = await failure(deployment.inference.Generate(turn((6,))))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "session 'tea' is in use: it takes one turn or change at a time"
    # Others go on, also those of the same name and another salt.
    await deployment.inference.Generate(turn((6,), "coffee"))
    await deployment.inference.Generate(turn((6,), salt="mine"))
    first.cancel()


async def test_a_turn_that_does_not_end_well_leaves_the_session_as_it_was(
    deployment: Deployment,
) -> None:
    await deployment.inference.Generate(turn((5, 6), max_tokens=3))
    call = deployment.inference.GenerateStream(turn((7,), max_tokens=300))
    await frame(call, "accepted")
    await frame(call, "delta")
    call.cancel()
    await deployment.freed()
    await idle(deployment)
    late = deployment.inference.Generate(turn((7,), max_tokens=300), timeout=0.1)
    assert (await failure(late)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await idle(deployment)
    error = await failure(deployment.inference.Generate(turn((4096,))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    answer = await deployment.inference.Generate(turn((7,)))
    assert answer.usage.prompt_tokens == 2 + 3 + 1


async def test_a_turn_can_be_aborted(deployment: Deployment) -> None:
    asked = turn((5,), max_tokens=300)
    asked.request_id = "mine"
    call = deployment.inference.GenerateStream(asked)
    await frame(call, "accepted")
    await deployment.control.Abort(control_pb2.AbortRequest(request_id="mine"))
    assert (await failure(call)).code() is grpc.StatusCode.CANCELLED
    answer = await deployment.inference.Generate(turn((7,)))
    assert answer.usage.prompt_tokens == 1


async def test_salts_are_different_sessions(deployment: Deployment) -> None:
    await deployment.inference.Generate(turn((5, 6), salt="mine"))
    answer = await deployment.inference.Generate(turn((7,), salt="yours"))
    assert answer.usage.prompt_tokens == 1


async def test_a_session_returns_to_its_worker(deployment: Deployment) -> None:
    """Also when that one has more to do."""
    first = await deployment.inference.Generate(turn((5,), max_tokens=2))
    others = [
        deployment.inference.GenerateStream(request(max_tokens=300, ignore_eos=True))
        for _ in range(3)
    ]
    for call in others:
        await frame(call, "accepted")
    second = await deployment.inference.Generate(turn((6,), max_tokens=2))
    assert first.worker == second.worker == "attention-0"
    for call in others:
        call.cancel()


async def test_a_known_prefix_names_the_worker(deployment: Deployment) -> None:
    prompt = tiny_model.prompt(130)
    busy = deployment.inference.GenerateStream(request(max_tokens=300, ignore_eos=True))
    assert (await frame(busy, "accepted")).worker == "attention-0"
    taught = await deployment.inference.Generate(request(prompt, max_tokens=2))
    assert taught.worker == "attention-1"
    busy.cancel()
    await deployment.freed()
    answer = await deployment.inference.Generate(request((*prompt, 9), max_tokens=2))
    assert answer.worker == "attention-1"


async def test_a_session_that_fills_the_context_says_so(deployment: Deployment) -> None:
    await deployment.inference.Generate(turn(tiny_model.prompt(390), max_tokens=5))
    error = await failure(deployment.inference.Generate(turn((5, 6, 7, 8, 9))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the prompt has 5 tokens after 395 of the session and fills" in str(error.details())


@pytest.mark.parametrize(
    ("session_id", "salt", "words"),
    [
        ("x" * 129, "", "session_id must have 1 to 128 characters, not 129"),
        ("a\nb", "", "session_id 'a\\nb' has unprintable characters"),
        ("a", "y" * 257, "cache_salt must have at most 256 characters, not 257"),
        ("", "y" * 257, "cache_salt must have at most 256 characters, not 257"),
    ],
)
async def test_a_name_that_is_none(
    deployment: Deployment, session_id: str, salt: str, words: str
) -> None:
    error = await failure(deployment.inference.Generate(turn((5,), session_id, salt=salt)))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, words)


async def test_without_a_store_a_turn_is_refused_and_a_request_is_not(
    deployment: Deployment,
) -> None:
    await deployment.gateway.gateway.sessions.stores.update([])
    error = await failure(deployment.inference.Generate(turn((5,))))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "no KV store" in str(error.details())
    await deployment.inference.Generate(request(max_tokens=1))


async def test_an_answer_that_cannot_be_recorded_does_not_end_in_final(
    tmp_path: Path, deployment: Deployment
) -> None:
    async with session_store("kvstore-0") as row:
        await deployment.gateway.gateway.sessions.stores.update([row])
        call = deployment.inference.GenerateStream(turn((5,), max_tokens=100))
        await frame(call, "accepted")
        await frame(call, "delta")
    error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert str(error.details()).startswith("KV store kvstore-0: ")


async def idle(deployment: Deployment) -> None:
    async with asyncio.timeout(30):
        while deployment.gateway.gateway.num_active:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
