"""Whoever answers wrongly is found out: scripted answers of a real server, over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cluster.chaos.questions import Question
from cluster.chaos.traffic import Log, Traffic
from protos import inference_pb2, inference_pb2_grpc
from services import rpc

QUESTION = Question(prompt=(1, 2, 3), max_tokens=4, temperature=0.0, seed=7, answer=(5, 6, 7, 8))
Frame = inference_pb2.GenerateStreamResponse


def accepted() -> Frame:
    return Frame(accepted=inference_pb2.Accepted(request_id="r", worker="w"))


def delta(number: int, *token_ids: int) -> Frame:
    return Frame(delta=inference_pb2.Delta(sequence_number=number, token_ids=token_ids))


def final(prompt_tokens: int = 3, completion_tokens: int = 4) -> Frame:
    usage = inference_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    return Frame(final=inference_pb2.Final(usage=usage))


RIGHT = (accepted(), delta(0, 5), delta(1, 6, 7), delta(2, 8), final())


class Scripted(inference_pb2_grpc.InferenceServicer):
    def __init__(self, frames: tuple[Frame, ...], status: grpc.StatusCode) -> None:
        self._frames = frames
        self._status = status
        self.asked: list[inference_pb2.GenerateRequest] = []

    async def GenerateStream(
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[inference_pb2.GenerateRequest, Frame],
    ) -> AsyncIterator[Frame]:
        self.asked.append(request)
        for frame in self._frames:
            yield frame
        if self._status is not grpc.StatusCode.OK:
            await context.abort(self._status, "as told")


async def log_of(
    folder: Path, *frames: Frame, status: grpc.StatusCode = grpc.StatusCode.OK
) -> tuple[Log, Scripted]:
    """What one stream notes of at least two requests."""
    servicer = Scripted(frames, status)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    address = f"unix:{folder}/grpc.sock"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with rpc.channel(address) as channel, asyncio.timeout(30):
            traffic = Traffic(channel, [QUESTION], streams=1, seed=0)
            running = asyncio.create_task(traffic.run())
            while len(servicer.asked) < 2:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            traffic.stop()
            await running
    finally:
        await server.stop(grace=None)
    return traffic.log, servicer


async def test_a_right_answer(tmp_path: Path) -> None:
    log, scripted = await log_of(tmp_path, *RIGHT)
    assert (log.wrong, log.failed) == ([], [])
    assert log.num_answered == len(log.exchanges) >= 2
    assert log.num_tokens == 4 * log.num_answered
    assert len(log.exchanges[0].arrivals) == 3
    (asked, *_) = scripted.asked
    assert tuple(asked.token_ids.ids) == QUESTION.prompt
    assert (asked.sampling.seed, asked.stopping.max_tokens) == (7, 4)


def _wrongs() -> Iterator[tuple[str, tuple[Frame, ...]]]:
    yield "other tokens from position 1", (accepted(), delta(0, 5), delta(1, 9))
    yield "other tokens from position 4", (*RIGHT[:-1], delta(3, 9))
    yield "sequence number 2 instead of 1", (accepted(), delta(0, 5), delta(2, 6))
    yield "sequence number 0 instead of 1", (accepted(), delta(0, 5), delta(0, 5))
    yield "frame 0 is delta", RIGHT[1:]
    yield "frame 2 is accepted", (accepted(), delta(0, 5), accepted())
    yield "delta after Final", (*RIGHT, delta(3, 9))
    yield "without Final", RIGHT[:-1]
    yield "2 tokens of 4", (accepted(), delta(0, 5), delta(1, 6), final(3, 2))
    yield "usage 4 + 3", (*RIGHT[:-1], final(4, 3))


@pytest.mark.parametrize(
    ("words", "frames"), [pytest.param(*each, id=each[0]) for each in _wrongs()]
)
async def test_a_wrong_answer_is_kept(
    tmp_path: Path, words: str, frames: tuple[Frame, ...]
) -> None:
    log, _ = await log_of(tmp_path, *frames)
    assert log.num_answered == 0
    assert all(words in line for line in log.wrong)
    assert len(log.wrong) >= 2
    assert log.failed == []


async def test_a_failure_is_kept(tmp_path: Path) -> None:
    log, _ = await log_of(tmp_path, *RIGHT[:3], status=grpc.StatusCode.UNAVAILABLE)
    assert log.num_answered == 0
    assert log.wrong == []
    assert all(line.startswith("UNAVAILABLE: as told") for line in log.failed)
    assert len(log.failed) >= 2
