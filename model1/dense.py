"""The forward pass as the paper writes it: whole sequences, masks instead of caches, gradients.

The slow twin of `Trunk.forward`, on the same parameters. Training runs on it, and tests hold the
fast path against it. Knows nothing of KV pools, chunks or where experts run.

Letters: B sequences, S positions, T = B*S tokens, D hidden, n streams, H heads, d head_dim,
W window, M compressed entries, E experts, k experts a token.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.config import AttentionKind, ModelConfig
from model1.modules import AttentionWeights, CompressorWeights, ExpertLayerWeights, IndexerWeights
from model1.modules import FeedForwardWeights as FeedForward
from model1.moe import ExpertBank
from model1.trunk import Block, Trunk


@dataclass(frozen=True, slots=True)
class DenseOptions:
    """`sparse=False` lets a CSA layer see every closed entry (the first phase of training)."""

    sparse: bool = True
    indexer_loss: bool = False


@dataclass(frozen=True, slots=True)
class DenseOutput:
    hidden: Tensor  # [B, S, D], what the head multiplies
    indexer_loss: Tensor  # scalar, 0 when not asked for; reaches the indexers' parameters only
    expert_loads: tuple[Tensor, ...]  # per layer, [E] tokens routed to each expert


def logits(trunk: Trunk, bank: ExpertBank, token_ids: Tensor) -> Tensor:
    """`token_ids [B, S]` -> float32 logits `[B, S, vocab]`."""
    return F.linear(forward(trunk, bank, token_ids).hidden.float(), trunk.head.weight)


def forward(
    trunk: Trunk, bank: ExpertBank, token_ids: Tensor, options: DenseOptions | None = None
) -> DenseOutput:
    options = options or DenseOptions()
    config = trunk.config
    batch, length = token_ids.shape
    streams = F.embedding(token_ids.flatten(), trunk.embed.weight)
    streams = streams.unsqueeze(1).repeat(1, config.hc_mult, 1)  # [T, n, D]
    indexer_losses, loads = [], []
    for block, experts in zip(trunk.layers, bank.layers, strict=True):
        block, experts = cast(Block, block), cast(ExpertLayerWeights, experts)
        site = (block.hc_attn_fn, block.hc_attn_base, block.hc_attn_scale)
        pre, post, comb = _mix(streams, *cast(tuple[Tensor, Tensor, Tensor], site), config)
        x = _rms_norm(_read(streams, pre), block.attn_norm.weight, config)
        attended = _Attention(config, block.kind, trunk, options)(
            x.unflatten(0, (batch, length)), block.attn
        )
        streams = _write(streams, attended.output.flatten(0, 1), post, comb)
        indexer_losses.append(attended.indexer_loss)

        site = (block.hc_ffn_fn, block.hc_ffn_base, block.hc_ffn_scale)
        pre, post, comb = _mix(streams, *cast(tuple[Tensor, Tensor, Tensor], site), config)
        x = _rms_norm(_read(streams, pre), block.ffn_norm.weight, config)
        y, load = _moe(x, token_ids.flatten(), block.ffn, experts, config)
        streams = _write(streams, y, post, comb)
        loads.append(load)

    raw = _normed_projection(streams, trunk.hc_head_fn, config).t().contiguous()  # [T, n]
    pre = torch.sigmoid(raw * trunk.hc_head_scale + trunk.hc_head_base) + config.hc_eps
    hidden = _rms_norm(_read(streams, pre), trunk.norm.weight, config)
    return DenseOutput(
        hidden.unflatten(0, (batch, length)), torch.stack(indexer_losses).mean(), tuple(loads)
    )


# ---- hyper-connections (spec 2.1) ----


def _mix(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """`streams [T, n, D]` -> pre `[T, n]`, post `[T, n]`, comb `[T, n, n]`, float32."""
    n, eps = config.hc_mult, config.hc_eps
    raw = _normed_projection(streams, fn, config)  # [(2+n)n, T]
    pre = torch.sigmoid(raw[:n] * scale[0] + base[:n, None]) + eps
    post = 2 * torch.sigmoid(raw[n : 2 * n] * scale[1] + base[n : 2 * n, None])
    # Tokens last: the 39 normalisations then run over long rows instead of 4 by 4 corners.
    c = (raw[2 * n :] * scale[2] + base[2 * n :, None]).unflatten(0, (n, n))  # [n, n, T]
    c = c.softmax(dim=1) + eps
    c = c / (c.sum(dim=0, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        c = c / (c.sum(dim=1, keepdim=True) + eps)
        c = c / (c.sum(dim=0, keepdim=True) + eps)
    return pre.t().contiguous(), post.t(), c.permute(2, 0, 1)


def _normed_projection(streams: Tensor, fn: Tensor, config: ModelConfig) -> Tensor:
    x = streams.flatten(1).float()  # [T, n*D]
    inverse_rms = torch.rsqrt(x.square().mean(dim=-1) + config.rms_norm_eps)
    return (fn @ x.t()) * inverse_rms


def _read(streams: Tensor, pre: Tensor) -> Tensor:
    return torch.bmm(pre.unsqueeze(1), streams.float()).squeeze(1).to(streams.dtype)  # [T, D]


def _write(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`post[k] * y + sum_j comb[j, k] * streams[j]`, as one product over (streams, y)."""
    coefficients = torch.cat([comb.transpose(1, 2), post.unsqueeze(2)], dim=2)  # [T, n, n+1]
    sources = torch.cat([streams, y.unsqueeze(1)], dim=1).float()  # [T, n+1, D]
    return torch.bmm(coefficients, sources).to(streams.dtype)


# ---- attention (spec 2.2 to 2.5) ----


@dataclass(frozen=True, slots=True)
class _Attended:
    output: Tensor  # [B, S, D]
    indexer_loss: Tensor


class _Attention:
    """One layer's attention: what depends on the layer's kind is chosen here, once."""

    def __init__(
        self, config: ModelConfig, kind: AttentionKind, trunk: Trunk, options: DenseOptions
    ) -> None:
        self.config = config
        self.options = options
        self.kind = kind
        self.frequencies = trunk.rope.main if kind is AttentionKind.SWA else trunk.rope.compress

    def __call__(self, x: Tensor, w: AttentionWeights) -> _Attended:
        """`x [B, S, D]`, already normed."""
        config, length = self.config, x.shape[1]
        heads, d = config.num_attention_heads, config.head_dim
        turn = _rotations(torch.arange(length, device=x.device), self.frequencies)
        qr = _rms_norm(F.linear(x, w.wq_a.weight), w.q_norm.weight, config)
        q = F.linear(qr, w.wq_b.weight).unflatten(-1, (heads, d))  # [B, S, H, d]
        q = _rotate(_rms_norm(q, None, config), turn) * d**-0.5
        kv = _rotate(_rms_norm(F.linear(x, w.wkv.weight), w.kv_norm.weight, config), turn)

        blocks, window_scores = self._window(q, kv)  # [B, S/W, d, 2W], [B, S, H, 2W]
        entries, visible, index_scores = self._entries(x, qr, turn, w)  # [B, M, d], [B, S, M]
        num_entries = entries.shape[1]
        entry_scores = (q.flatten(1, 2) @ entries.transpose(1, 2)).unflatten(1, (length, heads))
        entry_scores = entry_scores.masked_fill(~visible.unsqueeze(2), -torch.inf)
        sink = w.attn_sink[:, None].expand(*q.shape[:3], 1)
        # The sink takes its share of the softmax and brings no value.
        p = torch.cat([window_scores, entry_scores, sink.to(q.dtype)], -1).softmax(-1)
        p_window, p_entries, _ = p.split([2 * config.sliding_window, num_entries, 1], -1)

        padded = F.pad(p_window.flatten(2), (0, 0, 0, -length % config.sliding_window))
        per_block = padded.view(x.shape[0], blocks.shape[1], -1, blocks.shape[3])
        o = (per_block @ blocks.transpose(2, 3)).reshape(x.shape[0], -1, heads, d)[:, :length]
        o = o + (p_entries.flatten(1, 2) @ entries).unflatten(1, (length, heads))
        o = _rotate(o, turn.conj())  # values carry the key's rotation: undo the query's share
        groups = o.flatten(2).unflatten(-1, (config.o_groups, -1))
        wo_a = w.wo_a.weight.unflatten(0, (config.o_groups, -1))
        z = torch.einsum("bsgi,goi->bsgo", groups, wo_a).flatten(2)
        loss = x.new_zeros(())
        if index_scores is not None and self.options.indexer_loss:
            loss = _indexer_loss(p_entries.detach(), index_scores, visible)
        return _Attended(F.linear(z, w.wo_b.weight), loss)

    def _window(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Scores against the keys of the query's own block of W positions and the one before.

        Key j of block b is position (b-1)*W + j; query i is position b*W + i.
        """
        batch, length, heads, d = q.shape
        width = self.config.sliding_window
        pad = -length % width
        blocks = F.pad(kv, (0, 0, width, pad)).unfold(1, 2 * width, width)  # [B, S/W, d, 2W]
        queries = F.pad(q, (0, 0, 0, 0, 0, pad)).view(batch, blocks.shape[1], -1, d)
        scores = (queries @ blocks).view(batch, -1, heads, 2 * width)[:, :length]
        i = torch.arange(length, device=q.device) % width
        j = torch.arange(2 * width, device=q.device)
        seen = (j > i[:, None]) & (j <= i[:, None] + width)
        seen[:width] &= j >= width  # before the first position there is nothing
        return blocks, scores.masked_fill(~seen[:, None], -torch.inf)

    def _entries(
        self, x: Tensor, qr: Tensor, turn: Tensor, w: AttentionWeights
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The compressed entries, which of them each query sees, and the indexer's scores."""
        config = self.config
        if self.kind is AttentionKind.SWA:
            none = torch.zeros((*x.shape[:2], 0), dtype=torch.bool, device=x.device)
            return x.new_zeros((x.shape[0], 0, config.head_dim)), none, None
        ratio = config.csa_ratio if self.kind is AttentionKind.CSA else config.hca_ratio
        entries = _compress(x, w.compressor, ratio, self.frequencies, config)
        closed = (torch.arange(x.shape[1], device=x.device) + 1) // ratio
        visible = torch.arange(entries.shape[1], device=x.device) < closed[:, None]  # [S, M]
        visible = visible.expand(x.shape[0], -1, -1)
        selects = self.options.sparse and entries.shape[1] > config.index_topk
        if self.kind is AttentionKind.HCA or not (selects or self.options.indexer_loss):
            return entries, visible, None
        # Top-k has no gradient; the indexer learns from `_indexer_loss` alone.
        scores = self._index(x.detach(), qr.detach(), turn, w.indexer)
        if selects:
            ranked = scores.detach().masked_fill(~visible, -torch.inf)
            best = ranked.sort(dim=-1, descending=True, stable=True).indices[
                ..., : config.index_topk
            ]
            visible = visible & torch.zeros_like(visible).scatter(-1, best, True)
        return entries, visible, scores

    def _index(self, x: Tensor, qr: Tensor, turn: Tensor, w: IndexerWeights) -> Tensor:
        """`[B, S, M]`: how much each query wants each entry."""
        config = self.config
        heads, d = config.index_n_heads, config.index_head_dim
        q = _rotate(F.linear(qr, w.wq_b.weight).unflatten(-1, (heads, d)), turn)
        keys = _compress(x, w.compressor, config.csa_ratio, self.frequencies, config)
        a = F.linear(x, w.weights_proj.weight) * (d * heads) ** -0.5  # [B, S, heads]
        match = F.relu(q.flatten(1, 2) @ keys.transpose(1, 2)).unflatten(1, (-1, heads))
        scores: Tensor = (a.unsqueeze(2) @ match).squeeze(2)
        return scores


def _indexer_loss(p: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """KL from the attention's mass on the entries `[B, S, H, M]` to the indexer's softmax.

    As DeepSeek-V3.2 trained its indexer: heads summed, over the entries that were attended to.
    """
    mass = p.sum(2)
    has_entries = visible.any(-1)
    target = mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)
    floor = torch.finfo(scores.dtype).min
    log_q = scores.masked_fill(~visible, floor).log_softmax(-1).masked_fill(~visible, 0.0)
    kl = (target * (target.clamp_min(1e-9).log() - log_q)).sum(-1)
    return (kl * has_entries).sum() / has_entries.sum().clamp_min(1)


def _compress(
    x: Tensor, w: CompressorWeights, ratio: int, frequencies: Tensor, config: ModelConfig
) -> Tensor:
    """`x [B, S, D]` -> one entry a full window of `ratio` tokens, `[B, M, d_c]`; float32 inside."""
    num = x.shape[1] // ratio
    d = w.norm.weight.shape[0]
    if num == 0:
        return x.new_zeros((x.shape[0], 0, d))
    tokens = x[:, : num * ratio].float()
    c = F.linear(tokens, w.wkv.weight).unflatten(1, (num, ratio))  # [B, M, ratio, d or 2d]
    z = F.linear(tokens, w.wgate.weight).unflatten(1, (num, ratio)) + w.ape
    if c.shape[-1] == 2 * d:
        # Overlap: the window before gives its first series, this one its second.
        shift = (0, 0, 0, 0, 1, 0)
        c = torch.cat([F.pad(c[:, :-1, :, :d], shift), c[..., d:]], dim=2)
        z = torch.cat([F.pad(z[:, :-1, :, :d], shift, value=-torch.inf), z[..., d:]], dim=2)
    e = (z.softmax(dim=2) * c).sum(dim=2)
    positions = torch.arange(num, device=x.device) * ratio
    return _rotate(_rms_norm(e, w.norm.weight, config), _rotations(positions, frequencies)).to(
        x.dtype
    )


# ---- mixture of experts (spec 2.6) ----


def _moe(
    x: Tensor, token_ids: Tensor, w: FeedForward, experts: ExpertLayerWeights, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`x [T, D]` -> output `[T, D]`, load `[E]`."""
    scores = F.softplus(F.linear(x.float(), w.gate.weight)).sqrt()  # [T, E]
    if not w.gate.is_hashed:
        # The bias steers who is chosen, never how much a chosen expert weighs.
        biased = (scores + w.gate.bias).detach()
        chosen = biased.sort(dim=-1, descending=True, stable=True).indices
        chosen = chosen[:, : config.num_experts_per_tok]
    else:
        chosen = w.gate.tid2eid[token_ids]  # [T, k]
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor

    load = torch.bincount(chosen.flatten(), minlength=config.n_routed_experts)
    order = chosen.flatten().argsort(stable=True)  # pairs sorted by expert
    token_of_pair = order // config.num_experts_per_tok
    rows = x[token_of_pair].split(load.tolist())
    hidden = torch.cat([F.linear(r, experts.w13[e]) for e, r in enumerate(rows)])
    gate, up = hidden.chunk(2, dim=-1)
    hidden = _swiglu(gate, up, config.swiglu_limit) * weights.flatten()[order].unsqueeze(-1)
    down = [
        F.linear(h, experts.w2[e]) for e, h in enumerate(hidden.to(x.dtype).split(load.tolist()))
    ]
    s = w.shared_experts
    shared = _swiglu(F.linear(x, s.w1.weight), F.linear(x, s.w3.weight), config.swiglu_limit)
    y = F.linear(shared.to(x.dtype), s.w2.weight).float()
    return y.index_add(0, token_of_pair, torch.cat(down).float()).to(x.dtype), load


def _swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.float().clamp_max(limit)) * up.float().clamp(-limit, limit)


def _rms_norm(x: Tensor, weight: Tensor | None, config: ModelConfig) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight, config.rms_norm_eps).to(x.dtype)


def _rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """`[S]` int -> unit complex numbers `[S, r/2]`."""
    angles = positions.float()[:, None] * frequencies
    return torch.complex(angles.cos(), angles.sin())


def _rotate(x: Tensor, by: Tensor) -> Tensor:
    """Turn the trailing pairs of `x [B, S, ..., d]` by the unit complex numbers `by [S, r/2]`."""
    r = 2 * by.shape[-1]
    pairs = torch.view_as_complex(x[..., -r:].float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * by.view(by.shape[0], *[1] * (x.dim() - 3), -1)
    return torch.cat([x[..., :-r], torch.view_as_real(turned).flatten(-2).to(x.dtype)], dim=-1)
