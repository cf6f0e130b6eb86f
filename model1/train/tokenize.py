"""Trains the byte-level BPE tokenizer on the generated corpus and writes tokenizer.json.

Owns the special tokens and their ids. Knows nothing of the model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model1.train import corpus, words

VOCAB_SIZE: Final = 4096
SPECIAL_TOKENS: Final = (
    "<｜begin▁of▁sentence｜>",  # id 0
    "<｜end▁of▁sentence｜>",  # id 1
    "<｜▁pad▁｜>",  # id 2
    corpus.USER,
    corpus.ASSISTANT,
)
NUM_DOCUMENTS: Final = 6_000


def train_tokenizer() -> Tokenizer:
    """The same tokenizer every time: corpus and trainer are deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"{tokenizer.get_vocab_size()} tokens, wanted {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)


def _texts() -> Iterator[str]:
    """The corpus, then every recall word often enough to become one token."""
    for seed in range(NUM_DOCUMENTS):
        document = corpus.document(
            corpus.Split.TRAIN, seed, num_words=60, recall_share=0.3, max_keys=16
        )
        yield "".join(span.text for span in document)
    yield from (f" {word}" for word in words.NOUNS for _ in range(50))
    yield from (f" {number}" for number in range(corpus.NUM_NUMBERS) for _ in range(9))
    yield from (f" {word}" for word in words.EVERYDAY for _ in range(8))
    yield from (word.capitalize() for word in words.EVERYDAY for _ in range(3))
    yield from (str(number) for number in range(1900, 2100))
