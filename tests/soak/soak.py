"""The whole proof in waves: an oracle in a process of its own, a tiered run, their comparison."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.soak.ledger import Differences, Ledger, compare
from tests.soak.nodes import two_nodes
from tests.soak.resident import run_resident
from tests.soak.soak_model import soak_model
from tests.soak.tiered import Resumes, TieredRun
from tests.soak.traffic import LONGEST_TOKENS, Session, sessions
from tests.soak.worker import running_worker

WAVE_SESSIONS = 128


@dataclass(slots=True)
class SoakReport:
    """What was played so far, and what differed."""

    seed: int
    sessions: int = 0
    turns: int = 0
    tokens_in_context: int = 0
    compared_tokens: int = 0
    compared_logits: int = 0
    different_tokens: int = 0
    different_logits: int = 0
    where: list[str] = field(default_factory=list)
    resumes: Resumes = field(default_factory=Resumes)
    seconds: float = 0.0

    @property
    def num_resumes(self) -> int:
        return self.resumes.by_pair.total()

    @property
    def bound(self) -> float:
        """When none of N resumed sessions differs: fewer than this share of all do (95%)."""
        return 3 / max(1, self.resumes.sessions)

    def add(self, wave: Sequence[Session], differences: Differences) -> None:
        self.sessions += len(wave)
        self.turns += sum(len(session.turns) for session in wave)
        self.tokens_in_context += sum(session.num_tokens for session in wave)
        self.compared_tokens += differences.compared_tokens
        self.compared_logits += differences.compared_logits
        self.different_tokens += differences.tokens
        self.different_logits += differences.logits
        self.where += differences.where

    def as_dict(self) -> dict[str, Any]:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        resumes = self.resumes
        return fields | {
            "bound_95": self.bound,
            "resumes": {
                each.name: getattr(resumes, each.name) for each in dataclasses.fields(resumes)
            },
        }

    def table(self) -> str:
        """For people: the pairs, then the result in one line."""
        resumes = self.resumes
        lines = [f"{'blocks alternately in':<20} {'resumes':>8}"]
        lines += [f"{pair:<20} {count:>8}" for pair, count in resumes.by_pair.items()]
        lines += ["", f"{'restored from':<20} {'tokens':>12}"]
        lines += [f"{place:<20} {count:>12}" for place, count in resumes.tokens.items()]
        lines += [f"{'(computed)':<20} {resumes.computed_tokens:>12}", ""]
        lines.append(
            f"{self.sessions} sessions of {self.tokens_in_context} tokens, "
            f"{self.resumes.sessions} of them resumed, {self.num_resumes} resumes, "
            f"{self.compared_tokens} tokens and {self.compared_logits} rows of logits "
            f"compared in {self.seconds:.0f} s: "
            f"{self.different_tokens} tokens and {self.different_logits} rows differ; "
            f"fewer than {self.bound:.2g} of resumed sessions do (3/N, 95%)"
        )
        return "\n".join(lines + self.where)


async def soak(
    *,
    seed: int,
    first: int,
    count: int,
    directory: Path,
    longest_tokens: int = LONGEST_TOKENS,
    progress: Callable[[SoakReport], None] | None = None,
) -> SoakReport:
    """Sessions `first` to `first + count` of the traffic of `seed`; `progress` after each wave."""
    report, start_seconds = SoakReport(seed), time.monotonic()
    starts = range(first, first + count, WAVE_SESSIONS)
    waves = [
        sessions(seed, start, min(WAVE_SESSIONS, first + count - start), longest_tokens)
        for start in starts
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_one_thread) as oracles:
        loop = asyncio.get_running_loop()
        ledgers = [loop.run_in_executor(oracles, _oracle, wave) for wave in waves]
        async with two_nodes(directory) as nodes, running_worker(nodes.home.address) as worker:
            run = TieredRun(worker, nodes)
            for wave, oracle in zip(waves, ledgers, strict=True):
                ledger = Ledger(await run.play(wave), worker.trunk.rows.copy())
                worker.trunk.rows.clear()
                report.add(wave, compare(await oracle, ledger))
                report.resumes = run.resumes
                report.seconds = time.monotonic() - start_seconds
                if progress is not None:
                    progress(report)
    return report


def _one_thread() -> None:
    torch.set_num_threads(1)


def _oracle(wave: Sequence[Session]) -> Ledger:
    return run_resident(soak_model(), wave)
