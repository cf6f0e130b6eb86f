"""The oracle: one request alone in one process, everything resident; and who compares with it."""

from collections import defaultdict
from collections.abc import Generator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model1.batch import Batch, Chunk
from model1.kv_pool import KVPool
from model1.trunk import Forward, Trunk
from tests.services import tiny_model

CONTEXT = 4096


class Answer(NamedTuple):
    """Greedy tokens, and the bytes of the logits that each was drawn from."""

    token_ids: tuple[int, ...]
    logits: tuple[bytes, ...]


@cache
def answer(prompt: tuple[int, ...], num_tokens: int) -> Answer:
    """Never stops early."""
    model = tiny_model.model(CONTEXT)
    pool = model.pool(len(prompt) + num_tokens)
    handle = pool.allocate(len(prompt) + num_tokens)
    pending, token_ids, rows = list(prompt), list[int](), list[bytes]()
    while len(token_ids) < num_tokens:
        chunk, pending = pending[:512], pending[512:]
        start = handle.num_tokens
        logits = model.step(pool, [Chunk(handle, start, chunk, 0 if pending else 1)])
        if not pending:
            rows.append(_bytes(logits[0]))
            token_ids.append(int(logits[0].argmax()))
            pending = [token_ids[-1]]
    return Answer(tuple(token_ids), tuple(rows))


class RecordingTrunk:
    """A trunk whose logits can be looked at afterwards."""

    def __init__(self, trunk: Trunk) -> None:
        self.config = trunk.config
        self.rows: dict[int, set[bytes]] = defaultdict(set)  # by number of tokens before
        self._trunk = trunk

    def __call__(self, batch: Batch, pool: KVPool) -> Forward:
        return self._recorded(batch, self._trunk(batch, pool))

    def assert_drew_from(self, prompt: tuple[int, ...], expected: Answer) -> None:
        """Every logit row of the oracle was computed here, bit for bit, at its position."""
        for number, row in enumerate(expected.logits):
            assert row in self.rows[len(prompt) + number], f"logits of token {number} differ"

    def _recorded(self, batch: Batch, forward: Forward) -> Generator[Any, Any, Tensor]:
        logits = yield from forward
        ends = batch.positions[batch.logit_rows] + 1
        for row, end in zip(logits, ends.tolist(), strict=True):
            self.rows[end].add(_bytes(row))
        return logits


def _bytes(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()
