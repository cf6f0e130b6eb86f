"""Questions whose answers are known beforehand, from one process that nothing happens to."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

SAMPLED_TEMPERATURE = 0.8
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 16, 400
MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS = 32, 128

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request as it is sent, and the one right answer."""

    prompt: Tokens
    max_tokens: int
    temperature: float
    seed: int
    answer: Tokens

    def __str__(self) -> str:
        return (
            f"{len(self.prompt)} prompt tokens, max_tokens {self.max_tokens}, temperature "
            f"{self.temperature:g}, seed {self.seed}"
        )


def known_questions(
    directory: Path, *, dtype: str, count: int, seed: int, told: Callable[[str], None]
) -> list[Question]:
    """`count` of them, each second one sampled; the same ones for the same seed and model."""
    from services.attention.loading import load_model  # imports torch

    model = load_model(directory, dtype=dtype)
    questions = []
    for number, asked in enumerate(_asked(model.config.vocab_size, count, seed), start=1):
        answer = model.generate(
            asked.prompt, asked.max_tokens, temperature=asked.temperature, seed=asked.seed
        )
        questions.append(replace(asked, answer=tuple(answer)))
        if number % 8 == 0 or number == count:
            told(f"{number} of {count} answers computed in one process")
    return questions


def _asked(vocab_size: int, count: int, seed: int) -> Iterator[Question]:
    draw = random.Random(f"questions {seed}")
    for number in range(count):
        num_tokens = draw.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
        yield Question(
            prompt=tuple(draw.randrange(vocab_size) for _ in range(num_tokens)),
            max_tokens=draw.randint(MIN_ANSWER_TOKENS, MAX_ANSWER_TOKENS),
            temperature=SAMPLED_TEMPERATURE if number % 2 else 0.0,
            seed=draw.randrange(2**32),
            answer=(),
        )
