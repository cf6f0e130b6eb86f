"""`Model`: one checkpoint in one process, for scripts, tests and as the oracle of the cluster."""

import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model1.batch import Batch, Chunk
from model1.checkpoint import load_config, load_experts, load_trunk
from model1.config import ModelConfig
from model1.errors import InvalidRequest
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVFormat
from model1.kv_pool import KVPool
from model1.modules import packed
from model1.moe import ExpertBank
from model1.sampling import SamplingParams, sample
from model1.trunk import Trunk, run_local

PREFILL_CHUNK_TOKENS = 512


class Model:
    """A whole model: trunk and all routed experts."""

    def __init__(self, trunk: Trunk, experts: ExpertBank) -> None:
        self.config: ModelConfig = trunk.config
        self.trunk = trunk
        self.experts = experts
        self._device = trunk.embed.weight.device

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Model":
        """Read a directory with config.json and safetensors (see `model1.checkpoint`)."""
        path = Path(path)
        config = load_config(path)
        every_expert = range(config.n_routed_experts)
        return cls(
            packed(load_trunk(path, dtype, device)),
            packed(load_experts(path, every_expert, dtype, device)),
        )

    def pool(
        self,
        max_tokens: int,
        max_sequences: int = 1,
        kv_format: KVFormat = KVFormat.NATIVE,
    ) -> KVPool:
        """A KV pool for this model that holds `max_tokens` tokens in all."""
        capacity = PoolCapacity(max_sequences, max_tokens, PREFILL_CHUNK_TOKENS)
        dtype, device = self.trunk.dtype, self._device
        return KVPool(self.config, capacity, dtype, device, kv_format=kv_format)

    @torch.inference_mode()
    def step(self, pool: KVPool, chunks: Sequence[Chunk]) -> Tensor:
        """One forward step over `chunks`; float32 logits `[num_logit_rows, vocab]`."""
        return run_local(self.trunk(Batch.build(pool, chunks), pool), self.experts)

    def logits(self, token_ids: Sequence[int], kv_format: KVFormat = KVFormat.NATIVE) -> Tensor:
        """float32 logits `[T, vocab]` at every position.

        Raises `InvalidRequest` for no tokens, ids outside of the vocabulary, or too many tokens.
        """
        self._validate(token_ids, new_tokens=0)
        pool = self.pool(len(token_ids), kv_format=kv_format)
        handle = pool.allocate(len(token_ids))
        parts = []
        for start in range(0, len(token_ids), PREFILL_CHUNK_TOKENS):
            ids = token_ids[start : start + PREFILL_CHUNK_TOKENS]
            parts.append(self.step(pool, [Chunk(handle, start, ids, len(ids))]))
        return torch.cat(parts)

    def generate(
        self,
        token_ids: Sequence[int],
        max_tokens: int = 16,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        kv_format: KVFormat = KVFormat.NATIVE,
    ) -> list[int]:
        """Continue `token_ids` by up to `max_tokens`; stops after an end-of-sequence token.

        Raises `InvalidRequest` as `logits` does, and for parameters out of range.
        """
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {max_tokens}")
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            seed=secrets.randbits(63) if seed is None else seed,
        )
        self._validate(token_ids, max_tokens)
        pool = self.pool(len(token_ids) + max_tokens, kv_format=kv_format)
        handle = pool.allocate(len(token_ids) + max_tokens)
        pending, generated = list(token_ids), list[int]()
        while len(generated) < max_tokens:
            start = handle.num_tokens
            ids, pending = pending[:PREFILL_CHUNK_TOKENS], pending[PREFILL_CHUNK_TOKENS:]
            logits = self.step(pool, [Chunk(handle, start, ids, 0 if pending else 1)])
            if pending:
                continue
            generated.append(sample(logits[0], params, handle.num_tokens))
            if generated[-1] in self.config.eos_token_ids:
                break
            pending = [generated[-1]]
        return generated

    def _validate(self, token_ids: Sequence[int], new_tokens: int) -> None:
        config = self.config
        if not token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token id")
        for position, token in enumerate(token_ids):
            if not 0 <= token < config.vocab_size:
                raise InvalidRequest(
                    f"token id {token} at position {position} is outside of the vocabulary "
                    f"[0, {config.vocab_size})"
                )
        if len(token_ids) + new_tokens > config.max_position_embeddings:
            raise InvalidRequest(
                f"{len(token_ids)} prompt tokens and {new_tokens} new ones exceed the context of "
                f"{config.max_position_embeddings} tokens"
            )
