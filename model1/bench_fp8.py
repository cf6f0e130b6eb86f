"""`model1 bench fp8`: KV kept in FP8 records against KV kept in bfloat16, in one run.

Bytes are counted from the layout. Speeds are of the mini model, one thread; both sides take turns,
step by step. Quality is that of the shipped model on recall lists that it has not seen, and of the
mini model's random weights. Reports; never judges.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model1 import shipped_model_dir
from model1.batch import Chunk
from model1.bench import CHUNK_TOKENS, MINI, machine, write_random_checkpoint
from model1.config import AttentionKind, ModelConfig
from model1.fp8 import Fp8Record
from model1.kv_layout import KVFormat, KVLayout, Unit
from model1.model import Model
from model1.tokenizer import Tokenizer
from model1.train import corpus
from model1.train.evaluate import RECALL_KEYS
from model1.train.presets import NANO_CONFIG

_SWA, _CSA, _HCA = AttentionKind.SWA, AttentionKind.CSA, AttentionKind.HCA
NATIVE, FP8 = KVFormat.NATIVE, KVFormat.FP8


def _released(hidden_size: int, *kinds: AttentionKind) -> ModelConfig:
    """Its KV alone: heads of 512 with 64 rotary dims and index keys of 128, as mini has."""
    no_hash = (False,) * len(kinds)
    return replace(MINI, hidden_size=hidden_size, attention_kinds=kinds, hash_routed=no_hash)


KV_SHAPES = {
    "nano": NANO_CONFIG,
    "mini": MINI,
    "V4-Flash": _released(4096, _SWA, _SWA, _CSA, *[_HCA, _CSA] * 20),
    "V4-Pro": _released(7168, _HCA, _HCA, *[_CSA, _HCA] * 29, _CSA),
}


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Of a bfloat16 model: bytes that a token adds, and those of a resume point beside them."""

    model: str
    native_per_token: float
    fp8_per_token: float
    native_tail: int
    fp8_tail: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Milliseconds: medians, and the median of the pairwise ratios."""

    case: str
    native_ms: float
    fp8_ms: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Quality:
    """FP8's logits against native ones over `num_tokens` positions.

    `largest_difference` is relative to the largest logit; recall is the share of right answers.
    """

    case: str
    num_tokens: int
    same_argmax: float
    kl_nats: float
    largest_difference: float
    native_recall: float | None = None
    fp8_recall: float | None = None


def kv_bytes(name: str) -> KVBytes:
    native, fp8 = (KVLayout.of(KV_SHAPES[name], torch.bfloat16, f) for f in (NATIVE, FP8))
    return KVBytes(
        name,
        native.nbytes(Unit.BLOCK) / native.block_tokens,
        fp8.nbytes(Unit.BLOCK) / fp8.block_tokens,
        native.tail_nbytes,
        fp8.tail_nbytes,
    )


def codec_speed(num_rows: int, repeats: int) -> list[Speed]:
    """Rows of the released size written and gathered at random, bfloat16 as they are and in FP8."""
    record = Fp8Record(MINI.head_dim, MINI.qk_rope_head_dim)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, MINI.head_dim, generator=draw).bfloat16()
    order = torch.randperm(num_rows, generator=draw)
    pool, records = rows.clone(), record.encode(rows)
    return [
        _in_turns(
            f"write {num_rows} rows",
            partial(pool.index_copy_, 0, order, rows),
            lambda: records.index_copy_(0, order, record.encode(rows)),
            repeats,
        ),
        _in_turns(
            f"gather {num_rows} rows",
            partial(pool.index_select, 0, order),
            lambda: record.decode(records.index_select(0, order), torch.bfloat16),
            repeats,
        ),
    ]


class _Side:
    """`batch` sequences of the same tokens in a pool of one format."""

    def __init__(self, model: Model, batch: int, max_tokens: int, kv_format: KVFormat) -> None:
        block_tokens = model.config.hca_ratio
        room = batch * -(-max_tokens // block_tokens) * block_tokens
        self._model = model
        self._pool = model.pool(room, batch, kv_format)
        self._handles = [self._pool.allocate(max_tokens) for _ in range(batch)]

    def prefill(self, token_ids: Sequence[int]) -> None:
        for handle in self._handles:
            self._model.step(self._pool, [Chunk(handle, handle.num_tokens, token_ids, 1)])

    def decode(self) -> None:
        self._model.step(self._pool, [Chunk(h, h.num_tokens, [2], 1) for h in self._handles])


def model_speed(model: Model, batch: int, context_tokens: int, steps: int) -> list[Speed]:
    """Prefill in chunks, if there are some, then decode steps."""
    native, fp8 = (_Side(model, batch, context_tokens + steps + 1, f) for f in (NATIVE, FP8))
    token_ids = _random_tokens(model, context_tokens)
    chunks = [token_ids[i : i + CHUNK_TOKENS] for i in range(0, context_tokens, CHUNK_TOKENS)]
    pairs = [
        (_milliseconds(partial(native.prefill, c)), _milliseconds(partial(fp8.prefill, c)))
        for c in chunks
    ]
    at = f"batch {batch}, {context_tokens} tokens"
    decode = _in_turns(f"decode, {at}", native.decode, fp8.decode, steps)
    # Of a few chunks the median is chance.
    return [_speed(f"prefill of a chunk, {at}", pairs), decode] if len(pairs) > 3 else [decode]


def recall_quality(model: Model, tokenizer: Tokenizer, num_keys: int, num_probes: int) -> Quality:
    """Lists of `num_keys` pairs, of which one random key is asked."""
    native, fp8, right = list[Tensor](), list[Tensor](), [0, 0]
    for seed in range(num_probes):
        probe = corpus.recall_probe(seed, num_keys)
        prompt = tokenizer.encode(probe.prompt)
        answer = tokenizer.encode(probe.answer, goes_on=True)
        for i, (parts, kv_format) in enumerate(((native, NATIVE), (fp8, FP8))):
            logits = model.logits([*prompt, *answer[:-1]], kv_format)
            parts.append(logits)
            right[i] += logits[len(prompt) - 1 :].argmax(dim=-1).tolist() == answer
    compared = _quality(f"recall of {num_keys} keys", torch.cat(native), torch.cat(fp8))
    shares = [count / num_probes for count in right]
    return replace(compared, native_recall=shares[0], fp8_recall=shares[1])


def random_quality(model: Model, num_tokens: int) -> Quality:
    token_ids = _random_tokens(model, num_tokens)
    return _quality(
        f"{num_tokens} random tokens", model.logits(token_ids), model.logits(token_ids, FP8)
    )


def run(steps: int, probes: int, as_json: bool) -> None:
    """The whole benchmark; tables for people or one JSON object."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="model1-bench-") as directory:
        _progress("writing and loading the mini checkpoint")
        write_random_checkpoint(Path(directory))
        mini = Model.from_checkpoint(directory, torch.bfloat16)
    speeds = [s for rows in (1, 64, 1536) for s in codec_speed(rows, max(steps, 20))]
    for batch, context_tokens in ((1, 512), (8, 512), (1, 4096)):
        _progress(f"prefill and decode, batch {batch}, {context_tokens} tokens")
        speeds += model_speed(mini, batch, context_tokens, steps)
    nano = Model.from_checkpoint(shipped_model_dir(), torch.bfloat16)
    tokenizer = Tokenizer.from_dir(shipped_model_dir())
    qualities = []
    for num_keys in RECALL_KEYS:
        _progress(f"recall of {num_keys} keys")
        qualities.append(recall_quality(nano, tokenizer, num_keys, probes))
    qualities.append(random_quality(mini, 1024))
    sizes = [kv_bytes(name) for name in KV_SHAPES]
    if as_json:
        report = {
            "machine": machine(),
            "bytes": [asdict(row) for row in sizes],
            "speed": [asdict(row) for row in speeds],
            "quality": [asdict(row) for row in qualities],
        }
        print(json.dumps(report))
    else:
        _print_tables(sizes, speeds, qualities, probes)


def _print_tables(
    sizes: Sequence[KVBytes], speeds: Sequence[Speed], qualities: Sequence[Quality], probes: int
) -> None:
    print(f"bfloat16 models, one thread, {machine()}; medians of both in turns")
    print(f"{'KV bytes':<32} {'native':>10} {'fp8':>10} {'ratio':>7}")
    for b in sizes:
        ratio = b.fp8_per_token / b.native_per_token
        token = f"{b.native_per_token:>10.1f} {b.fp8_per_token:>10.1f} {ratio:>6.3f}x"
        print(f"{b.model + ', a token':<32} {token}")
        tail = f"{b.native_tail:>10} {b.fp8_tail:>10} {b.fp8_tail / b.native_tail:>6.3f}x"
        print(f"{b.model + ', a resume point':<32} {tail}")
    print(f"{'milliseconds (mini)':<40} {'native':>9} {'fp8':>9} {'time':>7}")
    for s in speeds:
        print(f"{s.case:<40} {s.native_ms:>9.3f} {s.fp8_ms:>9.3f} {s.ratio:>6.2f}x")
    print(f"logits, nano ({probes} lists each), mini on random tokens")
    print(
        f"{'':<20} {'tokens':>7} {'same argmax':>12} {'KL nats':>9} {'largest':>8}  right answers"
    )
    for q in qualities:
        recall = ""
        if q.native_recall is not None:
            recall = f"{q.native_recall:.1%} native, {q.fp8_recall:.1%} fp8"
        numbers = f"{q.same_argmax:>12.2%} {q.kl_nats:>9.1e} {q.largest_difference:>8.3f}"
        print(f"{q.case:<20} {q.num_tokens:>7} {numbers}  {recall}")


def _quality(case: str, native: Tensor, fp8: Tensor) -> Quality:
    """Of logits `[T, vocab]`."""
    expected, actual = native.log_softmax(dim=-1), fp8.log_softmax(dim=-1)
    divergence = (expected.exp() * (expected - actual)).sum(dim=-1)
    return Quality(
        case,
        len(native),
        float((native.argmax(dim=-1) == fp8.argmax(dim=-1)).float().mean()),
        float(divergence.mean()),
        float((native - fp8).abs().max() / native.abs().max()),
    )


def _in_turns(
    case: str, native: Callable[[], object], fp8: Callable[[], object], repeats: int
) -> Speed:
    native(), fp8()
    return _speed(case, [(_milliseconds(native), _milliseconds(fp8)) for _ in range(repeats)])


def _speed(case: str, pairs: Sequence[tuple[float, float]]) -> Speed:
    return Speed(
        case,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _random_tokens(model: Model, count: int) -> list[int]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (count,), generator=draw).tolist()


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
