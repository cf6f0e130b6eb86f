"""Rows are full, targets follow inputs, and what is drawn at random weighs nothing."""

import pytest
import tokenizers
import torch

from model1 import shipped_model_dir
from model1.train import corpus
from model1.train.batches import ANSWER_WEIGHT, encode_document, token_batch
from model1.train.corpus import Split
from model1.train.presets import NANO, Phase


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shipped_model_dir() / "tokenizer.json"))


@pytest.mark.parametrize("chosen", NANO.phases)
def test_a_batch_is_full_rows_and_the_same_every_time(
    tokenizer: tokenizers.Tokenizer, chosen: Phase
) -> None:
    one, again = (token_batch(tokenizer, Split.TRAIN, 7, chosen, 1024) for _ in range(2))
    assert one.inputs.shape == (1024 // chosen.sequence_tokens, chosen.sequence_tokens)
    assert torch.equal(one.inputs, again.inputs)
    assert torch.equal(one.inputs[:, 1:], one.targets[:, :-1])
    assert (one.inputs[:, 0] == 0).all()
    other = token_batch(tokenizer, Split.TRAIN, 8, chosen, 1024)
    assert not torch.equal(one.inputs, other.inputs)


def test_span_by_span_encoding_equals_encoding_the_whole_text(
    tokenizer: tokenizers.Tokenizer,
) -> None:
    for seed in range(60):
        spans = corpus.document(Split.TRAIN, seed, num_words=60, recall_share=0.4, max_keys=8)
        ids, _ = encode_document(tokenizer, spans)
        text = "".join(span.text for span in spans)
        assert ids[1:-1] == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_value_counts_only_where_the_list_already_gave_it(
    tokenizer: tokenizers.Tokenizer,
) -> None:
    spans = corpus.recall(Split.TRAIN, 3, 30, 4)
    ids, weights = encode_document(tokenizer, spans)
    words = [tokenizer.decode([i]) for i in ids]
    start = words.index(" Now")
    assert not any(weights[3 : start - 1])
    answers = [i for i in range(start, len(ids)) if words[i - 1] == " ="]
    assert answers
    assert all(weights[i] == ANSWER_WEIGHT for i in answers)
