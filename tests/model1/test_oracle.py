"""The whole model against transformers' on random checkpoints, and against itself cut otherwise.

float32 logits may differ from transformers' by rounding only. Within our own paths nothing may
differ: one pass, chunks, single tokens and mixed batches give the same bits (design rule 3).
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model1 import Model
from model1.batch import Chunk
from model1.checkpoint import load_experts, load_trunk
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVHandle, KVPool
from model1.modules import packed
from tests.model1 import oracle
from tests.model1.oracle import CASES, Case

MAX_RELATIVE_DIFFERENCE = 2e-5  # of the largest logit
# Two index heads: ReLU makes a fifth of the scores exactly 0, so the choice of entries is full of
# ties. transformers breaks them at random (trap T16); we must break them the same way always.
TIED = Case(
    "tied_index_scores",
    {"compress_ratios": [4, 128, 4], "index_n_heads": 2, "index_topk": 3},
    (150,),
)
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
)
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.parametrize("device", DEVICES)


def _each(cases: Sequence[Case], *slow: str) -> pytest.MarkDecorator:
    """Of the cases; those named take long for what they show beyond the others."""
    marks = {name: [pytest.mark.slow] for name in slow}
    params = [pytest.param(case, marks=marks.get(case.name, []), id=case.name) for case in cases]
    return pytest.mark.parametrize("case", params)


each_case = _each(CASES)
each_case_and_ties = _each((*CASES, TIED), "all_hash_three_streams")
each_case_the_largest_slow = _each((*CASES, TIED), "all_hash_three_streams", "pro_schedule")
each_case_most_slow = _each(CASES, *(case.name for case in CASES[1:]))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))

Checkpoints = Callable[[Case], Path]
Models = Callable[[Case, torch.dtype, str], Model]
Whole = Callable[[Case, torch.dtype, str], Tensor]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    @cache
    def directory(case: Case) -> Path:
        path: Path = tmp_path_factory.mktemp(case.name)
        oracle.build(case, path)
        return path

    return directory


@pytest.fixture(scope="session")
def models(checkpoints: Checkpoints) -> Models:
    """Nobody may change one of them: what a sequence changes is in its pool."""
    return cache(
        lambda case, dtype, device: Model.from_checkpoint(checkpoints(case), dtype, device)
    )


@pytest.fixture(scope="session")
def whole(models: Models) -> Whole:
    """Logits of a case's longest prompt in one piece."""

    @cache
    def logits(case: Case, dtype: torch.dtype, device: str) -> Tensor:
        ids = oracle.token_ids(case, case.longest)
        return _in_pieces(models(case, dtype, device), ids, [len(ids)])

    return logits


@each_case
def test_logits_equal_those_of_transformers(
    case: Case, device: str, models: Models, record_property: Callable[[str, float], None]
) -> None:
    model = models(case, torch.float32, device)
    theirs = oracle.random_model(case).to(device)
    worst = 0.0
    for length in case.lengths:
        ids = oracle.token_ids(case, length)
        expected = oracle.logits(theirs, ids)
        difference = (model.logits(ids) - expected).abs().max() / expected.abs().max()
        assert difference <= MAX_RELATIVE_DIFFERENCE, f"{length} tokens: {difference:.1e}"
        worst = max(worst, float(difference))
    record_property("relative_difference", worst)


@each_case
def test_bfloat16_mostly_agrees_on_the_next_token(case: Case, device: str, models: Models) -> None:
    """Rounding flips choices of experts and entries, so logits cannot be compared closely."""
    ids = oracle.token_ids(case, case.longest)
    exact = models(case, torch.float32, device).logits(ids)
    rounded = models(case, torch.bfloat16, device).logits(ids)
    assert rounded.dtype == torch.float32
    assert (rounded.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean() >= 0.9


@pytest.mark.slow  # a model for every parameter
def test_every_parameter_shows_in_the_logits(device: str, checkpoints: Checkpoints) -> None:
    """Otherwise agreement would prove nothing about it."""
    case, directory = CASES[0], checkpoints(CASES[0])
    # Not packed: packed matrices are no parameters any more, and none could be changed.
    trunk = load_trunk(directory, torch.float32, device)
    experts = load_experts(directory, range(trunk.config.n_routed_experts), torch.float32, device)
    model = Model(trunk, experts)
    ids = oracle.token_ids(case, 140)  # one HCA window, 35 CSA entries to choose 3 from
    expected = model.logits(ids)
    changed = set[str]()
    for module in (trunk, experts):
        for name, tensor in module.state_dict().items():
            kept = tensor.clone()
            if tensor.is_floating_point():
                # Not a factor: norms would cancel it; not a shift: softmax would.
                tensor.copy_(kept.roll(1, dims=-1) if tensor.shape[-1] > 1 else -kept)
            else:
                tensor.copy_(kept.roll(1, dims=0))
            difference = (model.logits(ids) - expected).abs().max() / expected.abs().max()
            tensor.copy_(kept)
            assert difference > 50 * MAX_RELATIVE_DIFFERENCE, f"{name}: {difference:.1e}"
            changed.add(name)
    # A module that hides its matrices must not make this pass.
    assert {"head.weight", "layers.1.attn.wq_b.weight", "layers.0.w13"} <= changed


@each_case
def test_experts_reach_the_clamp(case: Case, device: str) -> None:
    theirs = oracle.random_model(case).to(device)
    with oracle.recorded(theirs, "shared_experts.gate_proj") as gates:
        oracle.logits(theirs, oracle.token_ids(case, case.longest))
    assert gates
    assert all((gate > 10).any() and (gate < -10).any() for gate in gates.values())


@each_dtype
@each_case_and_ties
def test_a_prompt_in_chunks_gives_the_same_bits_as_in_one_piece(
    case: Case, dtype: torch.dtype, device: str, models: Models, whole: Whole
) -> None:
    model = models(case, dtype, device)
    ids = oracle.token_ids(case, case.longest)
    ragged = random.Random(0)
    for sizes in (
        itertools.repeat(127),
        (ragged.choice((1, 2, 3, 5, 31, 97, 128)) for _ in itertools.count()),
    ):
        _assert_same_bits(_in_pieces(model, ids, sizes), whole(case, dtype, device))


@each_dtype
@each_case_the_largest_slow
def test_token_by_token_gives_the_same_bits_as_in_one_piece(
    case: Case, dtype: torch.dtype, device: str, models: Models, whole: Whole
) -> None:
    model = models(case, dtype, device)
    ids = oracle.token_ids(case, case.longest)
    expected = whole(case, dtype, device)
    # From the start over the first windows, and from just before the last HCA window closes.
    _assert_same_bits(_in_pieces(model, ids[:40], itertools.repeat(1)), expected[:40])
    late = max(len(ids) // 128 * 128 - 3, 40)
    sizes = itertools.chain([late], itertools.repeat(1))
    until = min(late + 12, len(ids))
    _assert_same_bits(_in_pieces(model, ids[:until], sizes), expected[:until])


@each_dtype
@each_case_and_ties
def test_a_sequence_gives_the_same_bits_alone_and_beside_others(
    case: Case, dtype: torch.dtype, device: str, models: Models, whole: Whole
) -> None:
    """A decoding one, one that starts, one in mid-prompt and one far longer, in one batch."""
    model = models(case, dtype, device)
    lengths = [case.longest, 5, case.longest // 2, case.longest - 1]
    prompts = [oracle.token_ids(case, n, seed) for seed, n in enumerate(lengths)]
    done = [lengths[0] - 1, 0, lengths[2] // 3, lengths[3] - 1]
    alone = [_in_pieces(model, ids, [len(ids)]) for ids in prompts[1:]]
    alone.insert(0, whole(case, dtype, device))
    with _sequences(model, lengths) as (pool, handles):
        starting = [
            Chunk(handle, 0, ids[:n], 0)
            for handle, ids, n in zip(handles, prompts, done, strict=True)
            if n
        ]
        for chunk in starting:
            _step(model, pool, [chunk])
        chunks = [
            Chunk(handle, n, ids[n:], len(ids) - n)
            for handle, ids, n in zip(handles, prompts, done, strict=True)
        ]
        together = _step(model, pool, chunks).split([c.num_logits for c in chunks])
    for ids_alone, n, rows in zip(alone, done, together, strict=True):
        _assert_same_bits(rows, ids_alone[n:])


@each_dtype
def test_a_recycled_pool_gives_the_same_bits_as_a_fresh_one(
    dtype: torch.dtype, device: str, models: Models
) -> None:
    case = CASES[0]
    model = models(case, dtype, device)
    first, second = (oracle.token_ids(case, n, seed) for seed, n in enumerate((300, 290)))
    fresh = _in_pieces(model, second, [290])
    pool = model.pool(384)
    for ids in (first, second):
        handle = pool.allocate(len(ids))
        logits = _step(model, pool, [Chunk(handle, 0, ids, len(ids))])
        pool.free(handle)
        pool.check()
    _assert_same_bits(logits, fresh)


@each_case_most_slow
def test_greedy_tokens_equal_those_of_transformers(case: Case, device: str, models: Models) -> None:
    model = models(case, torch.float32, device)
    theirs = oracle.random_model(case).to(device)
    for length, max_tokens in ((1, 12), (7, 30), (case.longest - 7, 12)):
        ids = oracle.token_ids(case, length)
        assert model.generate(ids, max_tokens=max_tokens) == oracle.greedy(theirs, ids, max_tokens)


def test_a_greedy_run_takes_the_lowest_of_tied_tokens(
    device: str, checkpoints: Checkpoints
) -> None:
    directory = checkpoints(CASES[0])
    trunk = load_trunk(directory, torch.float32, device)
    head = trunk.head.weight
    half = head.shape[0] // 2
    head[:half] = head[half:]  # every token has a twin with the very same logit
    experts = load_experts(directory, range(trunk.config.n_routed_experts), torch.float32, device)
    model = Model(packed(trunk), packed(experts))
    ids = oracle.token_ids(CASES[0], 20)
    generated = model.generate(ids, max_tokens=20)
    assert all(token < half for token in generated)
    logits = model.logits(ids + generated[:-1])[len(ids) - 1 :]
    assert torch.equal(logits[:, :half], logits[:, half:])
    assert generated == logits[:, :half].argmax(dim=-1).tolist()


def _assert_same_bits(rows: Tensor, expected: Tensor) -> None:
    """Row for row; says which differ instead of printing the tensors."""
    wrong = (rows != expected).any(dim=-1).nonzero().flatten().tolist()
    assert rows.shape == expected.shape
    assert not wrong, f"{len(wrong)} of {len(rows)} rows differ, first at {wrong[:5]}"


@torch.no_grad()
def _step(model: Model, pool: KVPool, chunks: Sequence[Chunk]) -> Tensor:
    return model.step(pool, chunks)


@contextmanager
def _sequences(model: Model, lengths: Sequence[int]) -> Iterator[tuple[KVPool, list[KVHandle]]]:
    """A pool with a handle a sequence; whole and empty again afterwards."""
    capacity = PoolCapacity(
        max_sequences=len(lengths),
        max_tokens=sum(-(-n // 128) * 128 for n in lengths),
        max_step_tokens=sum(lengths),
    )
    pool = KVPool(model.config, capacity, model.trunk.dtype, model.trunk.embed.weight.device)
    handles = [pool.allocate(n) for n in lengths]
    yield pool, handles
    pool.check()
    for handle in handles:
        pool.free(handle)
    pool.check()
    usage = pool.usage()
    assert usage.sequences == usage.blocks == usage.pages == 0


def _in_pieces(model: Model, ids: Sequence[int], sizes: Iterator[int] | list[int]) -> Tensor:
    """Logits `[T, vocab]` of one sequence run in steps of these many tokens."""
    with _sequences(model, [len(ids)]) as (pool, [handle]):
        parts, start = [], 0
        for size in sizes:
            piece = ids[start : start + size]
            parts.append(_step(model, pool, [Chunk(handle, start, piece, len(piece))]))
            start += len(piece)
            if start == len(ids):
                break
    return torch.cat(parts)
