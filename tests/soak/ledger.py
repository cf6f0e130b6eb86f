"""What a run said, bit by bit: every token and a digest of the logits that it was drawn from.

Two runs said the same when their ledgers do. Logits are noted where they are computed, in the
forward pass, which does not know whose they are; hence they are compared as a multiset of
(position, digest): what one run has and the other has not is a difference, whosever row it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from model1.batch import Batch
from model1.kv_pool import KVPool
from model1.trunk import Forward, Trunk


class LogitsRow(NamedTuple):
    """Logits for the token that stands at `position`."""

    position: int
    digest: bytes


def digest_row(logits: Tensor) -> bytes:
    """Of `logits [V]` float32, every bit."""
    return xxhash.xxh3_128_digest(logits.contiguous().numpy().tobytes())


@dataclass(slots=True)
class Ledger:
    """Answers by (session, turn), and every row of logits."""

    answers: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    rows: Counter[LogitsRow] = field(default_factory=Counter)

    def add(self, other: Ledger) -> None:
        self.answers |= other.answers
        self.rows += other.rows


class Differences(NamedTuple):
    """Between a run and its oracle; `where` names some of them."""

    tokens: int
    logits: int
    compared_tokens: int
    compared_logits: int
    where: tuple[str, ...]


def compare(oracle: Ledger, run: Ledger) -> Differences:
    """Tokens that differ, are missing or are too many; likewise rows of logits."""
    tokens, where = 0, list[str]()
    for key in sorted(oracle.answers.keys() | run.answers.keys()):
        expected, got = oracle.answers.get(key, ()), run.answers.get(key, ())
        if expected != got:
            num = _num_different(expected, got)
            tokens += num
            where.append(f"session {key[0]} turn {key[1]}: {num} tokens of {len(expected)}")
    missing, extra = oracle.rows - run.rows, run.rows - oracle.rows
    where += [f"logits at position {row.position}" for row in sorted(missing)]
    return Differences(
        tokens=tokens,
        logits=max(missing.total(), extra.total()),
        compared_tokens=sum(map(len, oracle.answers.values())),
        compared_logits=oracle.rows.total(),
        where=tuple(where[:20]),
    )


def _num_different(expected: Sequence[int], got: Sequence[int]) -> int:
    same = sum(a == b for a, b in zip(expected, got, strict=False))
    return max(len(expected), len(got)) - same


class RecordingTrunk(Trunk):
    """The same trunk, which notes the logits of every pass in `rows`."""

    def __init__(self, trunk: Trunk) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(trunk.__dict__)
        self.rows = Counter[LogitsRow]()

    def forward(self, batch: Batch, pool: KVPool) -> Forward:
        logits = yield from super().forward(batch, pool)
        positions = (batch.positions[batch.logit_rows] + 1).tolist()
        for position, row in zip(positions, logits, strict=True):
            self.rows[LogitsRow(position, digest_row(row))] += 1
        return logits
