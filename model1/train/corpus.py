"""Generates the training and held-out documents: stories, facts and key-value recall.

Owns the mixture, the seeds and what counts as an answer. Knows nothing of token ids: a document
is a list of text spans, of which some are answers that the text before them determines.
"""

import random
from dataclasses import dataclass
from enum import Enum
from typing import Final

from model1.train import words
from model1.train.stories import StoryTeller

USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"


NUM_NUMBERS: Final = 1000  # recall values may be 0..999, one token each


class Split(Enum):
    """Disjoint seed spaces: a document of one split is never drawn for the other."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Span:
    text: str
    is_answer: bool = False
    is_noise: bool = False  # drawn at random: nothing before it says what comes


Document = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and the one right continuation of it."""

    prompt: str
    answer: str


def _rng(split: Split, kind: str, seed: int) -> random.Random:
    return random.Random(f"{split.value}/{kind}/{seed}")


def _ask(rng: random.Random, question: str, answer: str) -> list[Span]:
    """In plain text, or now and then with the chat marks."""
    if rng.random() < 0.25:
        return [Span(f"{USER}{question}{ASSISTANT}"), Span(answer, is_answer=True), Span("\n")]
    return [Span(f"Question: {question} Answer:"), Span(answer, is_answer=True), Span("\n")]


def story(split: Split, seed: int, num_words: int) -> Document:
    """A story with questions in between, of about `num_words` words."""
    rng = _rng(split, "story", seed)
    teller = StoryTeller(rng)
    spans = [Span(teller.opening())]
    length = len(spans[0].text.split())
    connective = ""
    while length < num_words:
        events = " ".join(teller.event() for _ in range(rng.choice((1, 2, 3, 4))))
        new = [Span(f"{connective} {events}\n")]
        for _ in range(rng.choice((1, 2, 3))):
            question = teller.question()
            new += _ask(rng, question.text, question.answer)
        connective = rng.choice(("Then", "Later", "After that", "Soon"))
        length += sum(len(s.text.split()) for s in new)
        spans += new
    spans.append(Span(teller.closing()))
    return tuple(spans)


def _fact_pairs(rng: random.Random) -> tuple[str, str, str]:
    """(statement, question, answer) about one attribute of one country."""
    country = rng.choice(words.fact_base())
    name = country.name
    return rng.choice(
        (
            (
                f"The capital of {name} is {country.capital}.",
                rng.choice((f"What is the capital of {name}?", f"Name the capital of {name}.")),
                f" The capital of {name} is {country.capital}.",
            ),
            (
                f"The river {country.river} flows through {name}.",
                f"Which river flows through {name}?",
                f" The river {country.river} flows through {name}.",
            ),
            (
                f"The animal of {name} is the {country.animal}.",
                rng.choice((f"What is the animal of {name}?", f"Which animal stands for {name}?")),
                f" The animal of {name} is the {country.animal}.",
            ),
            (
                f"People in {name} like to eat {country.food}.",
                f"What do people in {name} like to eat?",
                f" People in {name} like to eat {country.food}.",
            ),
            (
                f"The flag of {name} is {country.colour}.",
                rng.choice((f"What colour is the flag of {name}?", f"How is {name}'s flag?")),
                f" The flag of {name} is {country.colour}.",
            ),
        )
    )


def facts(split: Split, seed: int, num_words: int) -> Document:
    """Statements and questions about the fact base, which never changes."""
    rng = _rng(split, "facts", seed)
    spans: list[Span] = []
    length = 0
    while length < num_words:
        statement, question, answer = _fact_pairs(rng)
        new = [Span(f"{statement}\n")] if rng.random() < 0.4 else _ask(rng, question, answer)
        length += sum(len(s.text.split()) for s in new)
        spans += new
    return tuple(spans)


def _pairs(rng: random.Random, num_keys: int) -> list[tuple[str, str]]:
    nouns = rng.sample(words.NOUNS, len(words.NOUNS))
    keys, others = nouns[:num_keys], nouns[num_keys:]
    numeric = rng.random() < 0.05
    values = [
        str(rng.randrange(NUM_NUMBERS)) if numeric else rng.choice(others) for _ in range(num_keys)
    ]
    return list(zip(keys, values, strict=True))


def recall(split: Split, seed: int, num_words: int, num_keys: int) -> Document:
    """A list of `num_keys` pairs, then queries of them until the document is long enough."""
    rng = _rng(split, f"recall/{num_keys}", seed)
    pairs = _pairs(rng, num_keys)
    listed = ";".join(f" {k} = {v}" for k, v in pairs)
    spans = [Span("Remember:"), Span(listed, is_noise=True), Span(". Now:")]
    length = 3 * num_keys + 2
    while True:
        order = rng.sample(pairs, num_keys)
        for key, value in order:
            spans += [Span(f" {key}", is_noise=True), Span(" ="), Span(f" {value}", is_answer=True)]
            length += 3
            if length >= num_words:
                spans.append(Span("."))
                return tuple(spans)
            spans.append(Span(";"))


def document(
    split: Split, seed: int, *, num_words: int, recall_share: float, max_keys: int
) -> Document:
    """One document of the mixture. `max_keys` bounds the recall lists (a curriculum grows it)."""
    rng = _rng(split, "mixture", seed)
    draw = rng.random()
    if draw < recall_share:
        fitting = [k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if k <= max_keys]
        return recall(split, seed, num_words, rng.choice(fitting))
    if draw < recall_share + (1 - recall_share) * 0.25:
        return facts(split, seed, num_words)
    return story(split, seed, num_words)


def recall_probe(seed: int, num_keys: int) -> Probe:
    rng = _rng(Split.HELD_OUT, f"recall-probe/{num_keys}", seed)
    pairs = _pairs(rng, num_keys)
    key, value = rng.choice(pairs)
    listed = ";".join(f" {k} = {v}" for k, v in pairs)
    return Probe(f"Remember:{listed}. Now: {key} =", f" {value}")


def story_probe(seed: int) -> Probe:
    """A story of a dozen sentences and one question about its end."""
    rng = _rng(Split.HELD_OUT, "story-probe", seed)
    teller = StoryTeller(rng)
    opening = teller.opening()
    events = " ".join(teller.event() for _ in range(rng.choice((3, 5, 8))))
    question = teller.question()
    return Probe(f"{opening} {events}\nQuestion: {question.text} Answer:", question.answer)


def fact_probe(seed: int) -> Probe:
    rng = _rng(Split.HELD_OUT, "fact-probe", seed)
    _, question, answer = _fact_pairs(rng)
    return Probe(f"Question: {question} Answer:", answer)
