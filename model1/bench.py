"""`model1 bench model`: this model against transformers' on the same random weights, in one run.

Both read one checkpoint of the *mini* configuration (bfloat16) and take turns, step by step, so
that whatever else the machine does falls on both. One thread. Reports medians and ratios; never
judges. Needs transformers (a development dependency).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model1.batch import Chunk
from model1.checkpoint import save_checkpoint
from model1.config import ModelConfig
from model1.errors import ModelError
from model1.kv_pool import KVPool
from model1.model import Model
from model1.moe import ExpertBank, ExpertCall
from model1.trunk import Trunk

CHUNK_TOKENS = 512
LONG_CONTEXT_TOKENS = 16384
PREFILL_TOKENS = 4096

MINI = ModelConfig.from_dict(
    {
        "vocab_size": 16384,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 256,
        "o_groups": 2,
        "o_lora_rank": 256,
        "sliding_window": 128,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128],
        "index_n_heads": 8,
        "index_head_dim": 128,
        "index_topk": 64,
        "num_hash_layers": 2,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "routed_scaling_factor": 1.5,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "max_position_embeddings": 32768,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    }
)


def write_random_checkpoint(directory: Path, config: ModelConfig = MINI, seed: int = 0) -> None:
    """A checkpoint of `config` with seeded random weights, bfloat16."""
    trunk, experts = Trunk(config), ExpertBank(config, range(config.n_routed_experts))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in [*trunk.named_parameters(), *experts.named_parameters()]:
        parameter.requires_grad_(False)
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=draw)
    for table in trunk.buffers():
        rows, k = table.shape
        first = torch.randint(config.n_routed_experts, (rows, 1), generator=draw)
        table.copy_((first + torch.arange(k)) % config.n_routed_experts)
    save_checkpoint(directory, config, trunk, experts, torch.bfloat16)


def random_call(config: ModelConfig, num_rows: int, seed: int = 0) -> ExpertCall:
    """bfloat16 rows of layer 0, for different experts each, all of them equally likely."""
    draw = torch.Generator().manual_seed(seed)
    k = config.num_experts_per_tok
    scores = torch.rand(num_rows, config.n_routed_experts, generator=draw)
    return ExpertCall(
        layer=0,
        rows=torch.randn(num_rows, config.hidden_size, generator=draw).to(torch.bfloat16),
        expert_ids=scores.topk(k).indices.sort(dim=-1).values.to(torch.int32),
        weights=torch.full((num_rows, k), 1 / k),
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Milliseconds of one operation: medians, and the median of the pairwise ratios."""

    case: str
    ours_ms: float
    theirs_ms: float
    ratio: float


class _Ours:
    """`batch` sequences of the same random tokens in one pool."""

    def __init__(self, model: Model, batch: int, max_tokens: int) -> None:
        self._model = model
        self._pool: KVPool = model.pool(batch * (max_tokens + 2 * MINI.hca_ratio), batch)
        self._handles = [self._pool.allocate(max_tokens) for _ in range(batch)]

    def prefill(self, tokens: Sequence[int]) -> None:
        for handle in self._handles:
            self._model.step(self._pool, [Chunk(handle, handle.num_tokens, tokens, 1)])

    def decode(self, token: int) -> None:
        self._model.step(self._pool, [Chunk(h, h.num_tokens, [token], 1) for h in self._handles])


class _Theirs:
    """The same with transformers' own cache."""

    def __init__(self, model: Any, batch: int) -> None:
        from transformers import DynamicCache

        self._model, self._batch = model, batch
        self._cache = DynamicCache(config=model.config)

    def prefill(self, tokens: Sequence[int]) -> None:
        with torch.no_grad():
            self._model(
                input_ids=torch.tensor([list(tokens)] * self._batch),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def decode(self, token: int) -> None:
        self.prefill([token])


def compare(
    steps: int, long_context: bool = True, progress: Callable[[str], None] = lambda _: None
) -> list[Comparison]:
    """All cases of the comparison, `steps` timed decode steps each."""
    with tempfile.TemporaryDirectory(prefix="model1-bench-") as directory:
        progress("writing and loading the mini checkpoint")
        write_random_checkpoint(Path(directory))
        ours, theirs = Model.from_checkpoint(directory, torch.bfloat16), _load_theirs(directory)
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(1)
    results = []
    for batch in (1, 8):
        progress(f"decode, batch {batch} at 512 tokens")
        a, b = _Ours(ours, batch, CHUNK_TOKENS + steps + 8), _Theirs(theirs, batch)
        prompt = _tokens(CHUNK_TOKENS, draw)
        a.prefill(prompt)
        b.prefill(prompt)
        results.append(_decode(f"decode, batch {batch}, 512 tokens", a, b, steps))
    total = LONG_CONTEXT_TOKENS if long_context else PREFILL_TOKENS
    a, b = _Ours(ours, 1, total + steps + 8), _Theirs(theirs, 1)
    pairs: list[tuple[float, float]] = []
    for end in range(CHUNK_TOKENS, total + 1, CHUNK_TOKENS):
        progress(f"prefill, {end} of {total} tokens")
        chunk = _tokens(CHUNK_TOKENS, draw)
        pairs.append((_seconds(partial(a.prefill, chunk)), _seconds(partial(b.prefill, chunk))))
        if end in (PREFILL_TOKENS, LONG_CONTEXT_TOKENS):
            sums = [sum(side) for side in zip(*pairs, strict=True)]
            case = f"prefill, {end} tokens in chunks of {CHUNK_TOKENS}"
            results.append(Comparison(case, sums[0] * 1e3, sums[1] * 1e3, sums[1] / sums[0]))
    progress(f"decode, batch 1 at {total} tokens")
    results.append(_decode(f"decode, batch 1, {total} tokens", a, b, steps))
    return results


def peak_memory(side: str, context_tokens: int = PREFILL_TOKENS) -> tuple[int, int]:
    """(bytes after loading, peak bytes) of a process that prefills and decodes one sequence."""
    command = [sys.executable, "-m", "model1.bench", side, str(context_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, peak = done.stdout.split()[-2:]
    return int(loaded), int(peak)


def run(steps: int, as_json: bool, long_context: bool = True) -> None:
    """The whole benchmark; a table for people or one JSON object."""
    results = compare(steps, long_context, lambda line: print(line, file=sys.stderr, flush=True))
    print("peak memory", file=sys.stderr, flush=True)
    memory = {side: peak_memory(side) for side in ("ours", "theirs")}
    if as_json:
        rows = [asdict(result) for result in results]
        print(json.dumps({"machine": machine(), "cases": rows, "memory_bytes": memory}))
        return
    print(f"mini, bfloat16, one thread, {machine()}; medians, theirs = transformers")
    print(f"{'case':<44} {'ours ms':>10} {'theirs ms':>10} {'speed-up':>9}")
    for r in results:
        print(f"{r.case:<44} {r.ours_ms:>10.1f} {r.theirs_ms:>10.1f} {r.ratio:>8.2f}x")
    short, long = results[0], results[-1]
    print(f"ours, {long.case} against {short.case}: {long.ours_ms / short.ours_ms:.2f}x")
    for side, (loaded, peak) in memory.items():
        above = (peak - loaded) / 2**20
        print(
            f"{side}: {loaded / 2**20:.0f} MiB loaded, peak {above:.0f} MiB above that for "
            f"{PREFILL_TOKENS} tokens"
        )


def _decode(case: str, ours: _Ours, theirs: _Theirs, steps: int) -> Comparison:
    for side in (ours, theirs):
        side.decode(1)
    pairs = [
        (_seconds(lambda: ours.decode(2)), _seconds(lambda: theirs.decode(2))) for _ in range(steps)
    ]
    return Comparison(
        case,
        statistics.median(a for a, _ in pairs) * 1e3,
        statistics.median(b for _, b in pairs) * 1e3,
        statistics.median(b / a for a, b in pairs),
    )


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _tokens(count: int, draw: torch.Generator) -> list[int]:
    return torch.randint(MINI.vocab_size, (count,), generator=draw).tolist()


def _load_theirs(directory: str) -> Any:
    try:
        from transformers import DeepseekV4ForCausalLM
    except ImportError as error:
        raise ModelError(
            "bench model compares with transformers: pip install transformers"
        ) from error
    return DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, torch {torch.__version__}"


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ModelError(f"/proc/self/status has no {key}; peak memory is measured on Linux only")


def _memory_child(side: str, context_tokens: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="model1-bench-") as directory:
        write_random_checkpoint(Path(directory))
        runner: _Ours | _Theirs
        if side == "ours":
            runner = _Ours(Model.from_checkpoint(directory, torch.bfloat16), 1, context_tokens + 8)
        else:
            runner = _Theirs(_load_theirs(directory), 1)
        runner.prefill([1])  # touches every weight
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark again
    loaded = _status_bytes("VmRSS")
    draw = torch.Generator().manual_seed(1)
    for _ in range(context_tokens // CHUNK_TOKENS):
        runner.prefill(_tokens(CHUNK_TOKENS, draw))
    runner.decode(2)
    print(loaded, _status_bytes("VmHWM"))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("side", choices=("ours", "theirs"))
    arguments.add_argument("context_tokens", type=int)
    parsed = arguments.parse_args()
    _memory_child(parsed.side, parsed.context_tokens)
