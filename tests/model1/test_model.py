"""One model in one process: what it refuses, where it stops, and that cuts are not seen."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.batch import Chunk
from model1.errors import InvalidRequest
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVPool
from model1.model import PREFILL_CHUNK_TOKENS, Model
from model1.moe import ExpertBank
from model1.trunk import Trunk
from tests.services import tiny_model
from tests.services.tiny_model import CONTEXT, VOCAB_SIZE, prompt

NEVER_ENDING = replace(tiny_model.CONFIG, eos_token_ids=())


def like_tiny(**changes: Any) -> Model:
    """The tiny model's weights under a config that changes no shape."""
    config, tiny = replace(NEVER_ENDING, **changes), tiny_model.model()
    trunk, bank = Trunk(config), ExpertBank(config, range(config.n_routed_experts))
    trunk.load_state_dict(tiny.trunk.state_dict())
    bank.load_state_dict(tiny.experts.state_dict())
    return Model(trunk.requires_grad_(False), bank.requires_grad_(False))


@pytest.fixture(scope="module")
def model() -> Model:
    return like_tiny()


def test_logits_are_float32_rows_one_a_token(model: Model) -> None:
    logits = model.logits(prompt(13))
    assert logits.shape == (13, VOCAB_SIZE)
    assert logits.dtype is torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("token_ids", "told"),
    (
        ([], ["empty"]),
        ([3, 4, VOCAB_SIZE], [VOCAB_SIZE, "position 2"]),
        ([3, -1], [-1, "position 1"]),
        ([3] * (CONTEXT + 1), [CONTEXT + 1, CONTEXT]),
    ),
    ids=("empty", "beyond_the_vocabulary", "negative", "too_long"),
)
def test_wrong_tokens_are_told(model: Model, token_ids: list[int], told: Sequence[object]) -> None:
    for ask in (model.logits, model.generate):
        with pytest.raises(InvalidRequest) as caught:
            ask(token_ids)
        for value in told:
            assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("max_tokens", 0),
        ("max_tokens", -4),
        ("temperature", -0.5),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ),
)
def test_wrong_parameters_are_told(model: Model, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}.*{value}"):
        model.generate([3], **{name: value})


def test_prompt_and_answer_must_fit_the_context(model: Model) -> None:
    token_ids = prompt(CONTEXT - 2)
    assert len(model.logits(prompt(CONTEXT))) == CONTEXT
    assert len(model.generate(token_ids, max_tokens=2)) == 2
    with pytest.raises(InvalidRequest, match=f"{CONTEXT - 2} prompt tokens and 3 new ones"):
        model.generate(token_ids, max_tokens=3)


def test_greedy_tokens_are_the_best_of_each_row_of_logits(model: Model) -> None:
    """Over the close of an HCA window (128 tokens) and many CSA windows."""
    token_ids = list(prompt(110))
    generated = model.generate(token_ids, max_tokens=30)
    logits = model.logits(token_ids + generated[:-1])[len(token_ids) - 1 :]
    assert generated == logits.argmax(dim=-1).tolist()


def test_an_end_token_is_the_last_one(model: Model) -> None:
    token_ids = prompt(9)
    endless = model.generate(token_ids, max_tokens=24)
    assert len(endless) == 24
    for end in {endless[0], endless[5], endless[-1]}:
        ends = like_tiny(eos_token_ids=(end, VOCAB_SIZE + 5))
        assert ends.generate(token_ids, max_tokens=24) == endless[: endless.index(end) + 1]


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    model = like_tiny(eos_token_ids=(7,))
    assert model.generate([7, 7], max_tokens=3) == like_tiny().generate([7, 7], max_tokens=3)


def test_a_seed_repeats_and_no_seed_does_not(model: Model) -> None:
    def draw(seed: int | None) -> list[int]:
        return model.generate([5], max_tokens=12, temperature=3.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_continued_answer_draws_the_same_tokens(model: Model) -> None:
    """Draws depend on the position, so what went on elsewhere is not noticed."""
    token_ids = list(prompt(20))
    drawn = model.generate(token_ids, max_tokens=16, temperature=2.0, top_p=0.9, seed=5)
    for done in (1, 7, 15):
        rest = model.generate(
            token_ids + drawn[:done], max_tokens=16 - done, temperature=2.0, top_p=0.9, seed=5
        )
        assert drawn[:done] + rest == drawn


def test_a_prompt_of_several_chunks_is_as_one_piece() -> None:
    length = PREFILL_CHUNK_TOKENS + 130
    model = like_tiny(max_position_embeddings=1024)
    token_ids = prompt(length)
    pool = KVPool(model.config, PoolCapacity(1, length, length))
    whole = model.step(pool, [Chunk(pool.allocate(length), 0, token_ids, length)])
    assert torch.equal(model.logits(token_ids), whole)
    assert model.generate(token_ids, max_tokens=1) == [int(whole[-1].argmax())]


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_sequences_cut_at_random_give_the_bits_of_one_piece(data: st.DataObject) -> None:
    """Several in one pool, each step some of them; all is given back at the end."""
    model = tiny_model.model()
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    prompts = [prompt(n, seed) for seed, n in enumerate(lengths)]
    pool = model.pool(sum(-(-n // 128) * 128 for n in lengths), len(lengths))
    handles = [pool.allocate(n) for n in lengths]
    parts: list[list[Tensor]] = [[] for _ in lengths]
    while unfinished := [i for i, n in enumerate(lengths) if handles[i].num_tokens < n]:
        chunks = []
        for i in data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True)):
            start, left = handles[i].num_tokens, lengths[i] - handles[i].num_tokens
            num_new = min(left, data.draw(st.sampled_from((1, 2, 3, 5, 31, 64, 150))))
            chunks.append(Chunk(handles[i], start, prompts[i][start : start + num_new], num_new))
        rows = model.step(pool, chunks).split([chunk.num_logits for chunk in chunks])
        for chunk, logits in zip(chunks, rows, strict=True):
            parts[handles.index(chunk.handle)].append(logits)
        pool.check()
    for part, token_ids in zip(parts, prompts, strict=True):
        assert torch.equal(torch.cat(part), model.logits(token_ids))
    for handle in handles:
        pool.free(handle)
    pool.check()
    usage = pool.usage()
    assert usage.sequences == usage.blocks == usage.pages == 0
