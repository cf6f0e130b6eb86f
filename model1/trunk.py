"""The forward pass of everything but the routed experts, read like the paper.

`Trunk.forward` is a generator: where the routed experts run, and what happens while their rows
are away, is its driver's business. Knows nothing of processes, networks or schedules.
"""

from collections.abc import Generator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from model1 import hyper_connection as mhc
from model1.attention import Rotations, attention
from model1.batch import Batch
from model1.config import AttentionKind, ModelConfig
from model1.kv_pool import KVPool
from model1.modules import AttentionWeights, FeedForwardWeights, Matrix, Weight
from model1.moe import ExpertBank, ExpertCall, local_sum, route, shared_expert
from model1.numerics import linear, rms_norm
from model1.rope import Rope

Forward: TypeAlias = Generator[ExpertCall | None, Tensor | None, Tensor]


class Block(nn.Module):
    """One layer's parameters: attention and MoE, each wrapped by hyper-connections."""

    def __init__(
        self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        n, hidden, f32 = config.hc_mult, config.hidden_size, torch.float32
        self.config = config
        self.kind: AttentionKind = config.attention_kinds[layer]
        rows = (2 + n) * n

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=f32, device=device))

        self.hc_attn_fn, self.hc_ffn_fn = parameter(rows, n * hidden), parameter(rows, n * hidden)
        self.hc_attn_base, self.hc_ffn_base = parameter(rows), parameter(rows)
        self.hc_attn_scale, self.hc_ffn_scale = parameter(3), parameter(3)
        self.attn_norm = Weight(torch.empty(hidden, dtype=f32, device=device))
        self.ffn_norm = Weight(torch.empty(hidden, dtype=f32, device=device))
        self.attn = AttentionWeights(config, self.kind, dtype, device)
        self.ffn = FeedForwardWeights(config, config.hash_routed[layer], dtype, device)

    def attn_site(self, streams: Tensor) -> mhc.Mix:
        fn, base, scale = self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale
        return mhc.mix(streams, fn, base, scale, self.config)

    def ffn_site(self, streams: Tensor) -> mhc.Mix:
        fn, base, scale = self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale
        return mhc.mix(streams, fn, base, scale, self.config)


class Trunk(nn.Module):
    """Embedding, attention, gates, shared experts, hyper-connections and head.

    Built with uninitialised parameters; `checkpoint.load_trunk` or training fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        device, f32 = torch.device(device), torch.float32
        n, hidden, vocab = config.hc_mult, config.hidden_size, config.vocab_size
        self.config = config
        self.dtype = dtype
        self.embed = Weight(torch.empty(vocab, hidden, dtype=dtype, device=device))
        blocks = [Block(config, i, dtype, device) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self._blocks = tuple(blocks)  # the same, typed
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * hidden, dtype=f32, device=device))
        self.hc_head_base = nn.Parameter(torch.empty(n, dtype=f32, device=device))
        self.hc_head_scale = nn.Parameter(torch.empty(1, dtype=f32, device=device))
        self.norm = Weight(torch.empty(hidden, dtype=f32, device=device))
        self.head = Matrix(torch.empty(vocab, hidden, dtype=f32, device=device))
        self.rope = Rope(config, device)

    def forward(self, batch: Batch, pool: KVPool) -> Forward:
        """Run one step over the batch's tokens and commit their KV to the pool.

        Yields, for each layer, an `ExpertCall` (resume with None at once: the shared expert is
        computed while the rows are away) and then None (resume with the float32 sum `[T, D]`).
        Returns float32 logits `[num_logit_rows, vocab]`.
        """
        config = self.config
        turns = Rotations.of(batch, self.rope)
        streams = self.embed.weight[batch.token_ids].float()
        streams = streams.unsqueeze(1).repeat(1, config.hc_mult, 1)
        for layer, block in enumerate(self._blocks):
            site = block.attn_site(streams)
            x = mhc.read(streams, site.pre).to(self.dtype)
            x = rms_norm(x, block.attn_norm.weight, config.rms_norm_eps)
            y = attention(x, block.attn, block.kind, pool.layers[layer], batch, turns, config)
            streams = mhc.write(streams, y, site)

            site = block.ffn_site(streams)
            x = mhc.read(streams, site.pre).to(self.dtype)
            x = rms_norm(x, block.ffn_norm.weight, config.rms_norm_eps)
            expert_ids, weights = route(x, batch.token_ids, block.ffn.gate, config)
            yield ExpertCall(layer, x, expert_ids, weights)
            shared = shared_expert(x, block.ffn.shared_experts, config.swiglu_limit)
            routed = yield None
            assert routed is not None
            streams = mhc.write(streams, (routed + shared.float()).to(x.dtype), site)

        for chunk in batch.chunks:
            pool.commit(chunk.handle, chunk.end)
        last = streams[batch.logit_rows]
        h = mhc.collapse(last, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, config)
        h = rms_norm(h.to(self.dtype), self.norm.weight, config.rms_norm_eps)
        return linear(h.float(), self.head.weight)


def run_local(forward: Forward, bank: ExpertBank) -> Tensor:
    """Drive a forward pass with all routed experts in this process; returns its logits."""
    try:
        call = next(forward)
        while True:
            assert call is not None
            forward.send(None)
            call = forward.send(local_sum(bank, call))
    except StopIteration as finished:
        logits: Tensor = finished.value
        return logits
