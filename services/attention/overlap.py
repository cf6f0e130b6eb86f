"""Whether a step runs as one batch or as two micro-batches, of which one's rows are with the
experts while the other's attention is computed: what was faster, as measured.

Two read every weight twice and wait less. Which of the two is more depends on the machine, the
model and the size of the step, so the policy tries the other way now and then, and pays for it out
of a fixed share of the time. Plain numbers in, plain numbers out: no clock, no tensor.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

# Of the time, spent on ways that turn out to be slower.
TRIAL_SHARE = 0.01
# Pairs of steps, one of either way, that a trial compares; one that is lost clearly suffices.
TRIAL_PAIRS = 3
CLEARLY_SLOWER = 1.25
# Those that decide: on a machine with other work one pair in three says the opposite.
REMEMBERED_PAIRS = 9
# A way that is faster by less is not worth a change: it may be chance.
MIN_GAIN = 0.03
# The first steps of a size are its slowest: memory is taken, streams are opened.
STEPS_BEFORE_TRIAL = 4
MIN_STEPS_BETWEEN_TRIALS = 64
# Overlap wins at most what is waited for. Less of a step than this is no reason to try.
MIN_WAIT_SHARE = 0.1
# How much the newest step counts.
_NEWEST = 0.2
# The smaller micro-batch has at least this share of the tokens, or it hides nothing.
MIN_PART_SHARE = 0.25


class StepSize(NamedTuple):
    """Steps that are compared with each other: within a factor of two, and of one kind."""

    max_tokens: int  # a power of two; more than half of it, to all of it
    has_prompts: bool

    @classmethod
    def of(cls, num_tokens: int, num_sequences: int) -> "StepSize":
        """A step that only decodes has one token a sequence."""
        return cls(1 << (num_tokens - 1).bit_length(), num_tokens > num_sequences)


class MeasuredStep(NamedTuple):
    """How a step ran and what it took; `wait_seconds` of it there was nothing to compute."""

    num_tokens: int
    micro_batches: int
    seconds: float
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A reading, for one size of step."""

    micro_batches: int  # what is used, except in trials
    ratio: float  # two's time over one's in the last trials; 0 before the first
    wait_share: float  # of the time of the way in use


@dataclass(slots=True)
class _Known:
    """Of one size of step."""

    micro_batches: int = 1
    ratio: float = 0.0
    wait_share: float = 0.0
    num_steps: int = 0
    steps_before_trial: int = STEPS_BEFORE_TRIAL
    # In a trial: seconds a token of the last step the usual way, and what the other took of that.
    usual: float | None = None
    trial: list[float] = field(default_factory=list)
    # Two's time over one's.
    pairs: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_PAIRS))

    @property
    def is_trial_due(self) -> bool:
        if self.steps_before_trial > 0:
            return False
        return self.micro_batches == 2 or self.wait_share >= MIN_WAIT_SHARE


class OverlapPolicy:
    """Chooses for each step, and learns from each. `forced` is 1 or 2, or None: as measured."""

    def __init__(self, forced: int | None = None) -> None:
        if forced not in (None, 1, 2):
            raise ValueError(f"a step runs as 1 or 2 micro-batches, not {forced}")
        self._forced = forced
        self._known: dict[StepSize, _Known] = {}

    def choose(self, size: StepSize) -> int:
        """How many micro-batches the next step of that size should be. Changes nothing."""
        if self._forced is not None:
            return self._forced
        known = self._known.get(size)
        if known is None:
            return 1
        if known.is_trial_due and known.usual is not None:
            return _other(known.micro_batches)
        return known.micro_batches

    def observe(self, size: StepSize, step: MeasuredStep) -> None:
        """A step that could have been split ran."""
        known = self._known.setdefault(size, _Known())
        seconds_a_token = step.seconds / step.num_tokens
        if step.micro_batches == known.micro_batches:
            share = step.wait_seconds / step.seconds
            newest = _NEWEST if known.num_steps else 1.0
            known.wait_share += newest * (share - known.wait_share)
            known.num_steps += 1
            known.steps_before_trial -= 1
            known.usual = seconds_a_token
        elif known.usual is not None:
            known.trial.append(seconds_a_token / known.usual)
            known.usual = None  # the next pair is measured anew: sequences grow meanwhile
            if len(known.trial) == TRIAL_PAIRS or known.trial[-1] > CLEARLY_SLOWER:
                _conclude(known)

    @property
    def choices(self) -> dict[StepSize, Choice]:
        return {
            size: Choice(known.micro_batches, known.ratio, known.wait_share)
            for size, known in self._known.items()
        }


def _conclude(known: _Known) -> None:
    """The end of a trial: go on with the faster way, and leave the other alone for so long that
    what the trial cost is a small share of it."""
    lost_steps = sum(max(0.0, ratio - 1.0) for ratio in known.trial)
    is_one_usual = known.micro_batches == 1
    known.pairs.extend(ratio if is_one_usual else 1.0 / ratio for ratio in known.trial)
    known.trial.clear()
    known.ratio = median(known.pairs)
    if (known.ratio if is_one_usual else 1.0 / known.ratio) < 1.0 - MIN_GAIN:
        known.micro_batches = _other(known.micro_batches)
        known.num_steps = 0  # the share of waiting is another one now
    known.steps_before_trial = max(MIN_STEPS_BETWEEN_TRIALS, round(lost_steps / TRIAL_SHARE))


def _other(micro_batches: int) -> int:
    return 3 - micro_batches


def halves(num_tokens: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """The slices of a step, by number, in two parts of about as many tokens; each slice whole.

    None if there is no second part worth the name.
    """
    parts: tuple[list[int], list[int]] = ([], [])
    sums = [0, 0]
    for number in sorted(range(len(num_tokens)), key=lambda number: -num_tokens[number]):
        lighter = int(sums[1] < sums[0])
        parts[lighter].append(number)
        sums[lighter] += num_tokens[number]
    if min(sums) < MIN_PART_SHARE * sum(sums):
        return None
    return sorted(parts[0]), sorted(parts[1])
