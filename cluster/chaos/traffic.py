"""Streams that ask without end, each answer compared token by token as it arrives.

Knows nothing of faults. What went wrong is kept; a stream that was failed asks its next question.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc.aio

from cluster.chaos.questions import Question
from protos import inference_pb2, inference_pb2_grpc

PAUSE_AFTER_FAILURE_SECONDS = 0.2


class WrongAnswer(Exception):
    """Other tokens than the known ones, or frames that are not as the protocol says."""


@dataclass(slots=True)
class Exchange:
    """One request. Times in seconds on `time.monotonic`."""

    stream: int
    started: float
    arrivals: list[float] = field(default_factory=list)  # of each message with tokens
    ended: float | None = None

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) between two messages with tokens."""
        return list(zip(self.arrivals, self.arrivals[1:], strict=False))


@dataclass(slots=True)
class Log:
    """What came of all requests so far. `exchanges` are those that ended, right or wrong."""

    exchanges: list[Exchange] = field(default_factory=list)
    num_answered: int = 0
    num_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Traffic:
    def __init__(
        self, channel: grpc.aio.Channel, questions: Sequence[Question], *, streams: int, seed: int
    ) -> None:
        self.log = Log()
        self._stub = inference_pb2_grpc.InferenceStub(channel)
        self._questions = questions
        self._num_streams = streams
        self._seed = seed
        self._stopping = False

    def stop(self) -> None:
        """Let every stream finish its request and ask no more."""
        self._stopping = True

    async def run(self) -> None:
        """Until stopped."""
        async with asyncio.TaskGroup() as streams:
            for number in range(self._num_streams):
                streams.create_task(self._stream(number))

    async def _stream(self, number: int) -> None:
        draw = random.Random(f"stream {self._seed} {number}")
        while not self._stopping:
            question = draw.choice(self._questions)
            exchange = Exchange(number, time.monotonic())
            try:
                await self._ask(question, exchange)
                self.log.num_answered += 1
            except WrongAnswer as error:
                self.log.wrong.append(f"{question}: {error}")
            except grpc.aio.AioRpcError as error:
                self.log.failed.append(f"{error.code().name}: {error.details()} ({question})")
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)
            exchange.ended = time.monotonic()
            self.log.exchanges.append(exchange)

    async def _ask(self, question: Question, exchange: Exchange) -> None:
        got: list[int] = []
        num_frames = num_deltas = 0
        final: inference_pb2.Final | None = None
        async for response in self._stub.GenerateStream(_to_wire(question)):
            frame = response.WhichOneof("frame")
            _expect((frame == "accepted") == (num_frames == 0), f"frame {num_frames} is {frame}")
            _expect(final is None, f"{frame} after Final")
            num_frames += 1
            if frame == "delta":
                delta = response.delta
                _expect(
                    delta.sequence_number == num_deltas,
                    f"sequence number {delta.sequence_number} instead of {num_deltas}",
                )
                num_deltas += 1
                if delta.token_ids:
                    exchange.arrivals.append(time.monotonic())
                got += delta.token_ids
                self.log.num_tokens += len(delta.token_ids)
                _expect_start(question, got)
            elif frame == "final":
                final = response.final
        _expect(final is not None, "the stream ended without Final")
        _expect(len(got) == len(question.answer), f"{len(got)} tokens of {len(question.answer)}")
        assert final is not None
        usage = final.usage
        _expect(
            (usage.prompt_tokens, usage.completion_tokens) == (len(question.prompt), len(got)),
            f"usage {usage.prompt_tokens} + {usage.completion_tokens}",
        )


def _to_wire(question: Question) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=question.prompt),
        sampling=inference_pb2.SamplingParams(temperature=question.temperature, seed=question.seed),
        stopping=inference_pb2.StoppingParams(max_tokens=question.max_tokens),
    )


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise WrongAnswer(otherwise)


def _expect_start(question: Question, got: Sequence[int]) -> None:
    if tuple(got) == question.answer[: len(got)]:
        return
    pairs = enumerate(zip(got, question.answer, strict=False))
    position = next((at for at, (ours, right) in pairs if ours != right), len(question.answer))
    raise WrongAnswer(f"other tokens from position {position} on")
