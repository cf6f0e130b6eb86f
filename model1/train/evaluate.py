"""Measures a trained model: held-out loss, recall by number of keys, questions answered.

Runs on the dense twin. Knows nothing of how the model was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from model1 import dense
from model1.moe import ExpertBank
from model1.train import corpus
from model1.train.batches import token_batch
from model1.train.corpus import Probe, Split
from model1.train.presets import Phase
from model1.trunk import Trunk

RECALL_KEYS = (1, 2, 4, 8, 16, 32)
_BATCH_PROBES = 16
_PAD = 2


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Mean negative log-likelihood in nats a token."""

    loss: float  # of every token, also those drawn at random
    predictable_loss: float  # without recall keys and values at their first mention
    num_tokens: int


@torch.no_grad()
def held_out(
    trunk: Trunk, bank: ExpertBank, tokenizer: Tokenizer, phase: Phase, num_batches: int
) -> HeldOut:
    device = trunk.embed.weight.device
    total = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for step in range(num_batches):
        batch = token_batch(tokenizer, Split.HELD_OUT, step, phase, 8 * phase.sequence_tokens)
        logits = dense.logits(trunk, bank, batch.inputs.to(device))
        nll = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten().to(device), reduction="none"
        ).cpu()
        counted = batch.weights.flatten() > 0
        total += torch.tensor([nll.sum().item(), nll[counted].sum().item()])
        counts += torch.tensor([nll.numel(), int(counted.sum())])
    every, predictable = (total / counts).tolist()
    return HeldOut(every, predictable, int(counts[0]))


def recall_accuracy(
    trunk: Trunk, bank: ExpertBank, tokenizer: Tokenizer, num_keys: int, num_probes: int
) -> float:
    """Share of held-out lists of `num_keys` pairs of which one random key is answered right."""
    probes = [corpus.recall_probe(seed, num_keys) for seed in range(num_probes)]
    return probe_accuracy(trunk, bank, tokenizer, probes)


@torch.no_grad()
def probe_accuracy(
    trunk: Trunk, bank: ExpertBank, tokenizer: Tokenizer, probes: Sequence[Probe]
) -> float:
    """Share of probes whose whole answer greedy decoding would give, token by token."""
    right = 0
    device = trunk.embed.weight.device
    for start in range(0, len(probes), _BATCH_PROBES):
        part = probes[start : start + _BATCH_PROBES]
        prompts = [[0, *tokenizer.encode(p.prompt, add_special_tokens=False).ids] for p in part]
        answers = [tokenizer.encode(p.answer, add_special_tokens=False).ids for p in part]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        # Padding on the right: a causal model does not see it.
        length = max(map(len, rows))
        ids = torch.tensor([row + [_PAD] * (length - len(row)) for row in rows], device=device)
        hidden = dense.forward(trunk, bank, ids).hidden
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            asked = hidden[b, len(prompt) - 1 : len(prompt) + len(answer) - 1]
            guess: Tensor = F.linear(asked, trunk.head.weight).argmax(-1)
            right += guess.tolist() == answer
    return right / len(probes)


@torch.no_grad()
def greedy(
    trunk: Trunk, bank: ExpertBank, tokenizer: Tokenizer, prompt: str, max_tokens: int
) -> str:
    """The continuation of `prompt` until end of sentence, unedited."""
    ids = [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    start = len(ids)
    device = trunk.embed.weight.device
    for _ in range(max_tokens):
        hidden = dense.forward(trunk, bank, torch.tensor([ids], device=device)).hidden[0, -1:]
        ids.append(int(F.linear(hidden, trunk.head.weight).argmax(-1)))
        if ids[-1] == 1:
            break
    text: str = tokenizer.decode(ids[start:])
    return text
