"""Routing against the formula, and that an expert's row depends on nothing but its own pair."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.modules import GateWeights, SharedExpertWeights, packed
from model1.moe import ExpertBank, ExpertCall, combine, local_sum, route, shared_expert
from tests.services import tiny_model

CONFIG = replace(
    tiny_model.CONFIG,
    hidden_size=48,
    n_routed_experts=12,
    num_experts_per_tok=4,
    moe_intermediate_size=40,
    routed_scaling_factor=2.5,
    swiglu_limit=3.0,
)
LAYER, TOKENS = 1, 60
CPU, F32 = torch.device("cpu"), torch.float32

each_dtype = pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=("float32", "bfloat16"))
pytestmark = pytest.mark.usefixtures("_no_gradients")


@pytest.fixture
def _no_gradients():
    with torch.no_grad():
        yield


def bank(
    expert_ids: Sequence[int], dtype: torch.dtype = F32, config: ModelConfig = CONFIG
) -> ExpertBank:
    """An expert's weights depend on its id alone, whatever bank it is in."""
    built = ExpertBank(config, expert_ids, dtype)
    for layer, weights in enumerate(built.layers):
        for matrix in weights.parameters():
            for slot, expert in enumerate(expert_ids):
                draw = torch.Generator().manual_seed(1000 * layer + expert)
                matrix[slot].copy_(torch.randn(matrix.shape[1:], generator=draw) * 0.3)
    return built


def call(dtype: torch.dtype = F32, seed: int = 0, tokens: int = TOKENS) -> ExpertCall:
    """Random rows, each for k distinct experts."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, CONFIG.hidden_size, generator=draw).to(dtype)
    order = torch.rand(tokens, CONFIG.n_routed_experts, generator=draw).argsort(dim=-1)
    ids = order[:, : CONFIG.num_experts_per_tok].sort(dim=-1).values.int()
    return ExpertCall(LAYER, rows, ids, torch.rand(ids.shape, generator=draw))


def pairs_of(asked: ExpertCall) -> tuple[Tensor, Tensor, Tensor]:
    """(row index, expert id, weight) of every pair."""
    tokens, k = asked.expert_ids.shape
    row_index = torch.arange(tokens).repeat_interleave(k)
    return row_index, asked.expert_ids.flatten().long(), asked.weights.flatten()


def test_an_expert_computes_the_formula() -> None:
    """float64, one pair after the other: the weight goes in before w2, the clamps before silu."""
    experts, asked = bank(range(12)), call()
    row_index, ids, weights = pairs_of(asked)
    out = experts(LAYER, asked.rows, row_index, ids, weights)
    limit, width = CONFIG.swiglu_limit, CONFIG.moe_intermediate_size
    w13, w2 = (parameter.double() for parameter in experts.layers[LAYER].parameters())
    clamped = 0
    for pair, (row, expert, weight) in enumerate(zip(row_index, ids, weights, strict=True)):
        both = w13[expert] @ asked.rows[row].double()
        gate, up = both[:width], both[width:]
        clamped += int((gate > limit).sum() + (up.abs() > limit).sum())
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        expected = w2[expert] @ (weight.double() * gate / (1 + (-gate).exp()) * up)
        torch.testing.assert_close(out[pair].double(), expected, rtol=2e-5, atol=2e-5)
    assert clamped > 100


@each_dtype
@pytest.mark.parametrize("layout", ("plain", "packed"))
def test_a_row_depends_on_its_own_pair_alone(layout: str, dtype: torch.dtype) -> None:
    experts = bank(range(12), dtype)
    if layout == "packed":
        experts = packed(experts)
    asked = call(dtype)
    row_index, ids, weights = pairs_of(asked)
    whole = experts(LAYER, asked.rows, row_index, ids, weights)
    draw = torch.Generator().manual_seed(5)
    for num_pairs in (1, 2, 3, 4, 5, 7, 17, 64, 150):
        some = torch.randperm(len(ids), generator=draw)[:num_pairs]
        out = experts(LAYER, asked.rows, row_index[some], ids[some], weights[some])
        assert torch.equal(out, whole[some]), f"{num_pairs} pairs"
        # The same pairs, their rows brought along with no others, in another order.
        moved = asked.rows[row_index[some]].flip(0)
        places = torch.arange(num_pairs).flip(0)
        out = experts(LAYER, moved, places, ids[some], weights[some])
        assert torch.equal(out, whole[some]), f"{num_pairs} pairs of their own rows"


@each_dtype
def test_banks_of_some_experts_give_the_bits_of_one_of_all(dtype: torch.dtype) -> None:
    asked = call(dtype)
    row_index, ids, weights = pairs_of(asked)
    whole = bank(range(12), dtype)(LAYER, asked.rows, row_index, ids, weights)
    parts = torch.full_like(whole, torch.nan)
    for held in ([0, 1, 2, 3, 4], [11, 5, 8], [6, 7, 9, 10]):
        mine = torch.isin(ids, torch.tensor(held))
        few = bank(held, dtype)
        parts[mine] = few(LAYER, asked.rows, row_index[mine], ids[mine], weights[mine])
    assert torch.equal(parts, whole)
    assert torch.equal(
        combine(parts.unflatten(0, (TOKENS, -1))), local_sum(bank(range(12), dtype), asked)
    )


def test_no_pairs_give_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for num_rows in (0, 3):
        rows = torch.zeros(num_rows, CONFIG.hidden_size, dtype=torch.bfloat16)
        out = bank(range(12), torch.bfloat16)(LAYER, rows, none, none, torch.zeros(0))
        assert out.shape == (0, CONFIG.hidden_size)
        assert out.dtype is torch.bfloat16


def test_an_expert_that_is_not_held_is_never_answered_for() -> None:
    asked = call()
    row_index, ids, weights = pairs_of(asked)
    with pytest.raises(AssertionError, match="hold"):
        bank([0, 1, 2])(LAYER, asked.rows, row_index, ids, weights)


@each_dtype
def test_rows_are_added_in_float32_one_after_the_other(dtype: torch.dtype) -> None:
    big = 2.0**24
    pairs = torch.tensor([[[big], [1.0], [1.0], [-big]], [[1.0], [1.0], [big], [-big]]]).to(dtype)
    # 2^24 + 1 rounds back to 2^24 in float32, so the two orders differ.
    assert combine(pairs).tolist() == [[0.0], [2.0]]
    assert combine(pairs).dtype is F32
    assert torch.equal(combine(pairs[:, :1]), pairs[:, 0].float())


def test_routing_is_the_formula() -> None:
    """float64: the bias takes part in the choice, not in the weights."""
    gate = GateWeights(CONFIG, hashed=False, device=CPU)
    draw = torch.Generator().manual_seed(1)
    gate.weight.normal_(generator=draw)
    gate.bias.normal_(generator=draw)
    x = torch.randn(TOKENS, CONFIG.hidden_size, generator=draw)
    ids, weights = route(x, torch.zeros(TOKENS, dtype=torch.int64), gate, CONFIG)
    assert ids.dtype is torch.int32 and weights.dtype is F32
    unbiased = 0
    for row in range(TOKENS):
        logits = (gate.weight.double() @ x[row].double()).tolist()
        scores = [math.sqrt(max(v, 0) + math.log1p(math.exp(-abs(v)))) for v in logits]
        ranked = sorted(range(12), key=lambda e: -(scores[e] + float(gate.bias[e])))[:4]
        assert ids[row].tolist() == sorted(ranked)
        total = sum(scores[e] for e in ranked)
        for e, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            assert weight == pytest.approx(scores[e] / total * 2.5, rel=1e-5)
        unbiased += sorted(ranked) == sorted(sorted(range(12), key=lambda e: -scores[e])[:4])
    assert unbiased < TOKENS / 2


def test_equal_scores_choose_the_lowest_experts() -> None:
    gate = GateWeights(CONFIG, hashed=False, device=CPU)
    gate.weight.fill_(0.1)
    gate.bias.zero_()
    gate.bias[7] = 0.5
    ids, weights = route(torch.ones(3, 48), torch.zeros(3, dtype=torch.int64), gate, CONFIG)
    assert ids.tolist() == [[0, 1, 2, 7]] * 3
    torch.testing.assert_close(weights, torch.full((3, 4), 2.5 / 4))


def test_a_hash_layer_takes_the_tokens_experts_and_weighs_them_by_score() -> None:
    gate = GateWeights(CONFIG, hashed=True, device=CPU)
    draw = torch.Generator().manual_seed(2)
    gate.weight.normal_(generator=draw)
    vocab = CONFIG.vocab_size
    gate.tid2eid.copy_(torch.rand(vocab, 12, generator=draw).argsort(dim=-1)[:, :4])
    tokens = torch.randint(vocab, (TOKENS,), generator=draw)
    x = torch.randn(TOKENS, CONFIG.hidden_size, generator=draw)
    ids, weights = route(x, tokens, gate, CONFIG)
    for row in range(TOKENS):
        assert ids[row].tolist() == sorted(gate.tid2eid[tokens[row]].tolist())
        logits = gate.weight.double() @ x[row].double()
        scores = torch.nn.functional.softplus(logits).sqrt()[ids[row].long()]
        torch.testing.assert_close(
            weights[row].double(), scores / scores.sum() * 2.5, rtol=1e-5, atol=0.0
        )


def test_scores_that_all_but_vanish_still_make_weights() -> None:
    """softplus(-200) is 0 in float32; a row of zeros must not divide by zero (trap T11)."""
    gate = GateWeights(CONFIG, hashed=False, device=CPU)
    gate.weight.fill_(-1.0)
    gate.bias.zero_()
    for scale in (1.0, 2.0, 40.0):
        x = torch.full((1, 48), scale)
        _, weights = route(x, torch.zeros(1, dtype=torch.int64), gate, CONFIG)
        assert weights.isfinite().all()
    x = torch.full((1, 48), 1.0)  # logits of -48: tiny, and exact enough
    _, weights = route(x, torch.zeros(1, dtype=torch.int64), gate, CONFIG)
    torch.testing.assert_close(weights, torch.full((1, 4), 2.5 / 4))


def test_the_shared_expert_is_clamped_too() -> None:
    weights = SharedExpertWeights(CONFIG, F32, CPU)
    draw = torch.Generator().manual_seed(3)
    for parameter in weights.parameters():
        parameter.normal_(generator=draw)
    x = torch.randn(7, CONFIG.hidden_size, generator=draw)
    gate = (x.double() @ weights.w1.weight.double().T).clamp(max=3.0)
    up = (x.double() @ weights.w3.weight.double().T).clamp(-3.0, 3.0)
    expected = (gate / (1 + (-gate).exp()) * up) @ weights.w2.weight.double().T
    torch.testing.assert_close(
        shared_expert(x, weights, 3.0).double(), expected, rtol=1e-5, atol=1e-5 * 300
    )
