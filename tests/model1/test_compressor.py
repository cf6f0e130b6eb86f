"""Compressed entries against the formula (spec 2.4), token after token and in every cut."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model1.batch import Batch, Chunk
from model1.compressor import Compressor, compress
from model1.config import AttentionKind, ModelConfig
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVPool
from model1.modules import CompressorWeights
from model1.rope import Rope, Rotation
from tests.services import tiny_model

CSA, HCA = AttentionKind.CSA, AttentionKind.HCA
CONFIG = replace(
    tiny_model.CONFIG,
    attention_kinds=(CSA, HCA),
    hash_routed=(False, False),
    csa_ratio=4,
    hca_ratio=16,
    head_dim=12,
    qk_rope_head_dim=4,
)
TOKENS = 75
LAYER = {CSA: 0, HCA: 1}

each_kind = pytest.mark.parametrize("kind", (CSA, HCA), ids=("csa", "hca"))


def weights_of(kind: AttentionKind) -> CompressorWeights:
    d = CONFIG.head_dim
    width, ratio = (2 * d, CONFIG.csa_ratio) if kind is CSA else (d, CONFIG.hca_ratio)
    weights = CompressorWeights(CONFIG.hidden_size, d, width, ratio, torch.device("cpu"))
    draw = torch.Generator().manual_seed(3)
    for parameter in weights.parameters():
        parameter.requires_grad_(False).normal_(generator=draw).mul_(0.5)
    return weights


def inputs(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, CONFIG.hidden_size, generator=draw)


def slow_entries(kind: AttentionKind, x: Tensor, config: ModelConfig) -> list[list[float]]:
    """Every entry of the whole sequence, channel by channel in float64."""
    weights, d, r = weights_of(kind), config.head_dim, config.qk_rope_head_dim
    m = weights.ape.shape[0]
    c = x.double() @ weights.wkv.weight.double().T
    z = x.double() @ weights.wgate.weight.double().T
    for t in range(len(x)):
        z[t] += weights.ape[t % m].double()
    theta = config.compress_rope_theta
    entries = []
    for w in range(len(x) // m):
        if kind is HCA:
            slots = [(t, 0) for t in range(m * w, m * w + m)]
        else:  # the window before with the first d columns, its own with the second
            slots = [(t, 0) for t in range(max(0, m * w - m), m * w)]
            slots += [(t, d) for t in range(m * w, m * w + m)]
        pooled = []
        for channel in range(d):
            gates = [math.exp(z[t, first + channel]) for t, first in slots]
            values = [float(c[t, first + channel]) for t, first in slots]
            pooled.append(sum(g * v for g, v in zip(gates, values, strict=True)) / sum(gates))
        mean_square = sum(value**2 for value in pooled) / d
        gain = weights.norm.weight.tolist()
        entry = [
            value * g / math.sqrt(mean_square + config.rms_norm_eps)
            for value, g in zip(pooled, gain, strict=True)
        ]
        for i in range(r // 2):
            at = d - r + 2 * i
            angle = m * w * theta ** (-2 * i / r)
            turned = complex(entry[at], entry[at + 1]) * complex(math.cos(angle), math.sin(angle))
            entry[at : at + 2] = [turned.real, turned.imag]
        entries.append(entry)
    return entries


def entries_of(
    kind: AttentionKind,
    sizes: list[int],
    *,
    beside: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The entries of one sequence run in steps of these sizes, beside a few others of one token."""
    pool = KVPool(CONFIG, PoolCapacity(1 + beside, 1024, 512), dtype)
    kv, x = pool.layers[LAYER[kind]], inputs()
    kv.state.units.fill_(torch.nan)  # what an earlier sequence left
    main, *others = [pool.allocate(TOKENS) for _ in range(1 + beside)]
    inverse_frequencies = Rope(CONFIG, torch.device("cpu")).compress
    for n in sizes:
        start = main.num_tokens
        chunks = [Chunk(handle, handle.num_tokens, [0], 0) for handle in others]
        chunks.append(Chunk(main, start, [0] * n, 0))
        batch = Batch.build(pool, chunks)
        rows = {
            id(main): x[start : start + n],
            **{id(handle): inputs(9)[start : start + 1] for handle in others},
        }
        step = torch.cat([rows[id(chunk.handle)] for chunk in batch.chunks]).to(dtype)
        plan = batch.csa if kind is CSA else batch.hca
        by = Rotation.at(plan.entry_positions, inverse_frequencies)
        compressor = Compressor(weights_of(kind), kv.entries)
        compress(step, [compressor], plan, kv.state, by, CONFIG.rms_norm_eps)
        for chunk in chunks:
            pool.commit(chunk.handle, chunk.end)
    ratio = CONFIG.csa_ratio if kind is CSA else CONFIG.hca_ratio
    return kv.entries.gather_units(torch.from_numpy(main.blocks)[None])[0, : TOKENS // ratio]


@each_kind
def test_entries_are_the_formula(kind: AttentionKind) -> None:
    expected = torch.tensor(slow_entries(kind, inputs(), CONFIG), dtype=torch.float64)
    actual = entries_of(kind, [TOKENS]).double()
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@each_kind
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_entries_have_the_same_bits_in_every_cut_and_company(
    kind: AttentionKind, dtype: torch.dtype
) -> None:
    whole = entries_of(kind, [TOKENS], dtype=dtype)
    assert whole.isfinite().all() and torch.equal(whole, whole.to(dtype).float())
    for sizes in ([1] * TOKENS, [3] * 25, [15, 1, 1, 31, 27], [70, 5], [2, 73]):
        for beside in (0, 2):
            assert torch.equal(entries_of(kind, sizes, beside=beside, dtype=dtype), whole)
