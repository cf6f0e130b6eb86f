"""Seeded multi-turn sessions: what people send, in lengths from a few tokens to thousands.

A session is a pure function of (seed, index), so any part of a traffic can be made again alone.
Knows neither engine nor tier.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST_TOKENS = 16
LONGEST_TOKENS = 8192
# So many neighbours draw from the same few documents; some of them are live together.
DOCUMENT_SESSIONS = 64
DOCUMENTS = 6
MAX_ANSWER_TOKENS = 200
FIRST_TOKEN_ID, END_TOKEN_ID = 2, 258  # of the tiny model's bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """New prompt tokens, which follow on the whole history, and how to answer them."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True, slots=True)
class Session:
    """A tenant's conversation. Answers end at `max_tokens`: no token stops them."""

    name: str
    cache_salt: str
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Of all prompts and answers."""
        return sum(len(turn.prompt) + turn.max_tokens for turn in self.turns)


def sessions(
    seed: int, first: int, count: int, longest_tokens: int = LONGEST_TOKENS
) -> list[Session]:
    """Sessions `first` to `first + count` of the traffic of `seed`."""
    return [_session(seed, index, longest_tokens) for index in range(first, first + count)]


def _session(seed: int, index: int, longest_tokens: int) -> Session:
    draw = random.Random(f"session {seed} {index}")
    total = round(SHORTEST_TOKENS * (longest_tokens / SHORTEST_TOKENS) ** draw.random())
    num_turns = min(draw.choice((2, 2, 3, 4)), total // 2)
    lengths = _split(draw, total, num_turns)
    turns = tuple(_turn(draw, length) for length in lengths)
    if draw.random() < 0.4:
        turns = (_with_prefix(seed, index, draw, turns[0]), *turns[1:])
    salt = draw.choice(("", "", "", "tenant"))
    return Session(f"{seed}.{index}", salt, turns)


def _split(draw: random.Random, total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` numbers of at least 2; the first is the longest on average."""
    spare = total - 2 * parts
    cuts = sorted(round(spare * draw.random() ** 0.5) for _ in range(parts - 1))
    return [b - a + 2 for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]


def _turn(draw: random.Random, num_tokens: int) -> Turn:
    most = min(MAX_ANSWER_TOKENS, num_tokens - 1)
    num_answer = round(most ** draw.random())
    # Half of the answers are greedy, as half of the world's are.
    temperature = draw.choice((0.0, 0.0, 0.7, 1.3))
    return Turn(
        prompt=_tokens(draw, num_tokens - num_answer),
        max_tokens=num_answer,
        temperature=temperature,
        top_p=draw.choice((1.0, 0.9)) if temperature else 1.0,
        top_k=draw.choice((0, 40)) if temperature else 0,
        seed=draw.getrandbits(62),
    )


def _with_prefix(seed: int, index: int, draw: random.Random, turn: Turn) -> Turn:
    """The same turn about a document that other sessions speak of too."""
    group = f"{seed} {index // DOCUMENT_SESSIONS} {draw.randrange(DOCUMENTS)}"
    num_shared = draw.randint(1, len(turn.prompt))
    shared = _tokens(random.Random(f"document {group}"), num_shared)
    prompt = shared + turn.prompt[num_shared:]
    return Turn(prompt, turn.max_tokens, turn.temperature, turn.top_p, turn.top_k, turn.seed)


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(FIRST_TOKEN_ID, END_TOKEN_ID), k=count))


def said_so_far(session: Session, answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The first turns, as many as have an answer: prompts and answers."""
    tokens: list[int] = []
    for turn, answer in zip(session.turns, answers, strict=False):
        tokens += turn.prompt
        tokens += answer
    return tuple(tokens)
