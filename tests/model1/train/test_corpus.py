"""The documents are right: answers follow from the text, splits differ, lists are consistent."""

import random
import re

import pytest

from model1 import shipped_model_dir
from model1.tokenizer import Tokenizer
from model1.train import corpus, words
from model1.train.corpus import Document, Split
from model1.train.stories import StoryTeller


def text_of(spans: Document) -> str:
    return "".join(span.text for span in spans)


def test_the_same_seed_gives_the_same_document() -> None:
    def draw(seed: int) -> Document:
        return corpus.document(Split.TRAIN, seed, num_words=80, recall_share=0.5, max_keys=8)

    assert [draw(i) for i in range(20)] == [draw(i) for i in range(20)]
    assert len({draw(i) for i in range(20)}) == 20


def test_held_out_documents_are_not_training_documents() -> None:
    train = {text_of(corpus.story(Split.TRAIN, i, 60)) for i in range(100)}
    held_out = {text_of(corpus.story(Split.HELD_OUT, i, 60)) for i in range(100)}
    assert not train & held_out


@pytest.mark.parametrize("num_keys", [1, 2, 8, 32])
def test_every_recall_answer_is_the_value_that_the_list_gave(num_keys: int) -> None:
    for seed in range(20):
        spans = corpus.recall(Split.TRAIN, seed, 200, num_keys)
        listed = dict(re.findall(r"(\w+) = (\w+)", spans[1].text))
        assert len(listed) == num_keys
        queries = re.findall(r"(\w+) = (\w+)", text_of(spans[2:]))
        assert queries
        assert all(listed[key] == value for key, value in queries)


def test_recall_probe_answers_from_its_own_list() -> None:
    for seed in range(50):
        probe = corpus.recall_probe(seed, 8)
        key = re.findall(r"(\w+) =$", probe.prompt)[0]
        assert f" {key} ={probe.answer}" in probe.prompt


def test_story_state_agrees_with_a_reader_of_the_text() -> None:
    """Reads the sentences with its own rules and answers the same questions."""
    for seed in range(300):
        teller = StoryTeller(random.Random(seed))
        teller.opening()
        place_of: dict[str, str] = {}
        carrier: dict[str, str] = {}
        for _ in range(15):
            sentence = teller.event()
            person = sentence.split()[0]
            if found := re.search(r" (?:to|in) the (\w+)\.$", sentence):
                place_of[person] = found[1]
            if found := re.search(r"(?:picked up|took|carried) the (\w+)", sentence):
                carrier[found[1]] = person
            if found := re.search(r"gave the (\w+) to (\w+)", sentence):
                carrier[found[1]] = found[2]
            if found := re.search(r"(?:left|put down) the (\w+)", sentence):
                del carrier[found[1]]
        assert teller.world.carried_by == carrier
        assert all(teller.world.place_of[p] == place for p, place in place_of.items())
        for thing, person in carrier.items():
            assert teller.world.object_place(thing) == teller.world.place_of[person]


def test_facts_are_always_the_same_and_never_contradict() -> None:
    assert words.fact_base() == words.fact_base()
    names = [c.name for c in words.fact_base()]
    assert len(set(names)) == len(names) == words.NUM_COUNTRIES


def test_each_recall_word_and_number_is_one_token() -> None:
    tokenizer = Tokenizer.from_dir(shipped_model_dir())
    numbers = tuple(str(n) for n in range(corpus.NUM_NUMBERS))
    split = [w for w in words.NOUNS + numbers if len(tokenizer.encode(f" {w}")) != 2]
    assert not split
