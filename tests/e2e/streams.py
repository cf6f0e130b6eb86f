"""Streams that ask known questions again and again, and look at every frame of the answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from protos import inference_pb2, inference_pb2_grpc
from tests.services import tiny_model

MAX_TOKENS = 24
PROMPTS = [tiny_model.prompt(10 + 7 * i, seed=i) for i in range(3)]
PROGRESS_TIMEOUT_SECONDS = 60


class Streams:
    """One stream a prompt, again and again; every answer is held against the one process's."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub) -> None:
        self.num_answers = [0] * len(PROMPTS)
        self._expected = [tiny_model.model().generate(ids, MAX_TOKENS) for ids in PROMPTS]
        self._stub = stub
        self._is_over = False
        self._answered = asyncio.Condition()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as streams:
            for number in range(len(PROMPTS)):
                streams.create_task(self._repeat(number))

    def end(self) -> None:
        self._is_over = True

    async def progress(self) -> None:
        """Every stream has ended an answer since."""
        before = list(self.num_answers)
        async with self._answered, asyncio.timeout(PROGRESS_TIMEOUT_SECONDS):
            await self._answered.wait_for(
                lambda: all(n > b for n, b in zip(self.num_answers, before, strict=True))
            )

    async def _repeat(self, number: int) -> None:
        while not self._is_over:
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=PROMPTS[number]),
                stopping=inference_pb2.StoppingParams(max_tokens=MAX_TOKENS),
            )
            tokens: list[int] = []
            numbers: list[int] = []
            async for frame in self._stub.GenerateStream(request):
                if frame.WhichOneof("frame") == "delta":
                    tokens += frame.delta.token_ids
                    numbers.append(frame.delta.sequence_number)
            assert tokens == self._expected[number]
            assert numbers == list(range(len(numbers)))
            async with self._answered:
                self.num_answers[number] += 1
                self._answered.notify_all()


@asynccontextmanager
async def streaming(channel: grpc.aio.Channel) -> AsyncIterator[Streams]:
    async with asyncio.TaskGroup() as group:
        streams = Streams(inference_pb2_grpc.InferenceStub(channel))
        group.create_task(streams.run())  # the first that fails ends the test
        yield streams
        streams.end()
