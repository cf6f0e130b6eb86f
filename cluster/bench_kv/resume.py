"""Time to first token of a session's next turn: resumed from a tier against computed again.

The worker that resumes is a fresh one, so that nothing is left of the session on the device, and
the tiers above the one that is measured have forgotten it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.bench_kv.rig import MAX_STEP_TOKENS, Answer, Rig, keys_of, random_tokens, tell
from cluster.bench_workload import SidesDiffer
from model1.kv_capacity import PoolCapacity
from services.kvstore.tier import Tier

ANSWER_TOKENS = 40  # of the turn before
TURN_TOKENS = 24  # of the new prompt
NEXT_TOKENS = 4  # compared between the sides

_USAGE = {Tier.RAM: "ram_tokens", Tier.DISK: "disk_tokens", Tier.COLD: "cold_tokens"}


@dataclass(frozen=True, slots=True)
class Resumed:
    """Medians in seconds; `ratio` is how many times faster than computing the same turn."""

    history_tokens: int
    tier: str
    restored_tokens: int
    seconds: float
    computed_seconds: float

    @property
    def ratio(self) -> float:
        return self.computed_seconds / self.seconds


async def measure_resume(
    rig: Rig, lengths: Sequence[int], tiers: Sequence[Tier], repeats: int
) -> list[Resumed]:
    """Raises `SidesDiffer`."""
    return [each for length in lengths for each in await _at(rig, length, tiers, repeats)]


def break_even(results: Sequence[Resumed], tier: str) -> int | None:
    """The shortest measured history from which on resuming was never slower than computing."""
    slower = [r.history_tokens for r in results if r.tier == tier and r.ratio < 1]
    faster = [r.history_tokens for r in results if r.tier == tier and r.ratio >= 1]
    return min((n for n in faster if n > max(slower, default=0)), default=None)


async def _at(rig: Rig, length: int, tiers: Sequence[Tier], repeats: int) -> list[Resumed]:
    vocab = rig.config.vocab_size
    prompt = random_tokens(length, vocab, f"history {length}")
    capacity = PoolCapacity(1, length + 256, MAX_STEP_TOKENS)
    tell(f"a session of {length} tokens")
    async with rig.worker(capacity) as worker:
        first = await worker.answer(prompt, ANSWER_TOKENS)
        await worker.written_back()
    await rig.store.flush()
    history = prompt + first.token_ids
    turn = history + random_tokens(TURN_TOKENS, vocab, f"turn {length}")
    keys = keys_of(first.kv_root, history)

    computed: list[float] = []
    resumed: dict[Tier, list[Answer]] = {tier: [] for tier in tiers}
    # The longest take as long as everything else together, and vary the least.
    for _ in range(repeats if length < 4096 else min(repeats, 2)):
        async with rig.worker(capacity, with_store=False) as worker:
            oracle = await worker.answer(turn, NEXT_TOKENS)
        computed.append(oracle.first_token_seconds)
        for tier in tiers:
            await rig.store.drop(keys, [above for above in (Tier.RAM, Tier.DISK) if above < tier])
            async with rig.worker(capacity) as worker:
                answer = await worker.answer(turn, NEXT_TOKENS)
            if answer.token_ids != oracle.token_ids:
                raise SidesDiffer(f"resumed from {tier.name}: other tokens than computed")
            resumed[tier].append(answer)
            # What was found missing above was filled from below: let all tiers have it again.
            await rig.store.flush()
    return [
        Resumed(
            history_tokens=len(history),
            tier=tier.name.lower(),
            restored_tokens=min(getattr(each.kv_usage, _USAGE[tier]) for each in answers),
            seconds=statistics.median(each.first_token_seconds for each in answers),
            computed_seconds=statistics.median(computed),
        )
        for tier, answers in resumed.items()
    ]
