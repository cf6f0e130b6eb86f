"""Turns documents into rows of token ids with a loss weight each.

A batch is a pure function of (split, step): a resumed run sees the same data in the same order.
Knows nothing of the model.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model1.train.corpus import Document, Split, document
from model1.train.presets import Phase

_BOS, _EOS = 0, 1
_MAX_DOCUMENTS_IN_ROW = 64
ANSWER_WEIGHT = 3.0  # against the words around it, most of which the templates give away


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """`inputs`, `targets`, `counted` all `[B, S]`; `targets[b, s]` follows `inputs[b, s]`."""

    inputs: Tensor  # int64
    targets: Tensor  # int64
    weights: Tensor  # float32: 0 where the target was drawn at random, more for answers


def encode_document(tokenizer: Tokenizer, spans: Document) -> tuple[list[int], list[float]]:
    """Ids and the loss weight of each, from begin to end of sentence.

    Spans end where the tokenizer splits words, so encoding them one by one changes nothing.
    """
    ids, weights = [_BOS], [0.0]
    for span in spans:
        new = tokenizer.encode(span.text, add_special_tokens=False).ids
        ids += new
        weight = 0.0 if span.is_noise else ANSWER_WEIGHT if span.is_answer else 1.0
        weights += [weight] * len(new)
    return [*ids, _EOS], [*weights, 1.0]


def token_batch(
    tokenizer: Tokenizer, split: Split, step: int, phase: Phase, batch_tokens: int
) -> TokenBatch:
    """Rows filled with documents, of which the last is cut."""
    length = phase.sequence_tokens
    num_rows = max(1, batch_tokens // length)
    rows = [_row(tokenizer, split, step * num_rows + r, phase) for r in range(num_rows)]
    ids = torch.tensor([row[0] for row in rows])
    weights = torch.tensor([row[1] for row in rows])
    return TokenBatch(ids[:, :-1], ids[:, 1:], weights[:, 1:])


def _row(
    tokenizer: Tokenizer, split: Split, index: int, phase: Phase
) -> tuple[list[int], list[float]]:
    wanted = phase.sequence_tokens + 1
    ids: list[int] = []
    weights: list[float] = []
    for i in range(_MAX_DOCUMENTS_IN_ROW):
        # The length is part of the seed: phases then never repeat each other's documents.
        seed = (phase.sequence_tokens << 40) + index * _MAX_DOCUMENTS_IN_ROW + i
        spans = document(
            split,
            seed,
            num_words=int(0.6 * phase.sequence_tokens),
            recall_share=phase.recall_share,
            max_keys=phase.max_keys,
        )
        new_ids, new_weights = encode_document(tokenizer, spans)
        ids += new_ids
        weights += new_weights
        if len(ids) >= wanted:
            break
    return ids[:wanted], weights[:wanted]
