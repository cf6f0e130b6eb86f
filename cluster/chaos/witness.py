"""A prompt whose KV an attention worker has: asked again and again, is it all still on the device?

Knows nothing of faults.
"""

from collections.abc import Sequence

import grpc.aio

from cluster.chaos.questions import Question
from protos import inference_pb2, inference_pb2_grpc

BLOCK_TOKENS = 128
MIN_TOKENS = 5 * BLOCK_TOKENS


class Witness:
    """With more than one attention worker it proves nothing: each has its own blocks."""

    def __init__(self, channel: grpc.aio.Channel, questions: Sequence[Question]) -> None:
        self._stub = inference_pb2_grpc.InferenceStub(channel)
        self._prompt: list[int] = []
        for question in questions:
            if len(self._prompt) < MIN_TOKENS:
                self._prompt += question.prompt
        self.num_blocks = 0  # that it had on the device at first
        self.num_lost = 0  # of these, not there any more at some later look

    async def begin(self) -> None:
        await self._blocks()
        self.num_blocks = await self._blocks()

    async def look(self) -> None:
        self.num_lost = max(self.num_lost, self.num_blocks - await self._blocks())

    async def _blocks(self) -> int:
        """How many of the prompt's the worker found on its device."""
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=self._prompt),
            stopping=inference_pb2.StoppingParams(max_tokens=1),
        )
        answer = await self._stub.Generate(request)
        return int(answer.usage.kv.device_tokens) // BLOCK_TOKENS
