"""Mixture of experts: who computes a token (`route`) and the routed experts themselves.

`ExpertBank` is a pure function of (layer, rows): it holds weights and no state, knows neither
sequences nor KV, and can therefore run in any process, on any replica (design rule 1).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model1.compiled import Floats, compiled, floats, on_cpu
from model1.config import ModelConfig
from model1.modules import ExpertLayerWeights, GateWeights, SharedExpertWeights
from model1.numerics import linear, softplus, swiglu


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One layer's routed work: `sum_k weights[t, k] * expert[expert_ids[t, k]](rows[t])`.

    `rows [T, D]` model dtype; `expert_ids [T, k]` int32, ascending in each row (the order in
    which outputs are added, design rule 2); `weights [T, k]` float32.
    """

    layer: int
    rows: Tensor
    expert_ids: Tensor
    weights: Tensor


def route(
    x: Tensor, token_ids: Tensor, gate: GateWeights, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """`x [T, D]` -> (expert ids `[T, k]` int32 ascending, weights `[T, k]` float32).

    All in float32 (trap T12). Ties in the choice go to the lowest expert id.
    """
    logits = linear(x.float(), gate.weight)  # [T, E]
    scale, k = config.routed_scaling_factor, config.num_experts_per_tok
    if gate.is_hashed:
        return weigh_experts(logits, gate.tid2eid[token_ids], scale)
    return choose_experts(logits, gate.bias, k, scale)


def _choose_experts_cpu(
    logits: Tensor, bias: Tensor, k: int, scale: float
) -> tuple[Tensor, Tensor]:
    ids = torch.empty(len(logits), k, dtype=torch.int32)
    weights = torch.empty(len(logits), k)
    _choose_rows(floats(logits), floats(bias), np.float32(scale), ids.numpy(), weights.numpy())
    return ids, weights


@on_cpu(_choose_experts_cpu)
def choose_experts(logits: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The k experts of the largest score + bias, and what `weigh_experts` says of them."""
    ranked = torch.sort(
        softplus(logits).sqrt_() + bias, dim=-1, descending=True, stable=True
    ).indices
    return _weigh_experts(logits, ranked[:, :k], scale)


def _weigh_experts_cpu(logits: Tensor, chosen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    ids = chosen.to(torch.int32).contiguous()
    weights = torch.empty(ids.shape)
    _weigh_rows_(floats(logits), np.float32(scale), ids.numpy(), weights.numpy())
    return ids, weights


def _weigh_experts(logits: Tensor, chosen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`logits [T, E]`, `chosen [T, k]` -> the chosen ascending, int32, and their weights."""
    ids = chosen.sort(dim=-1).values
    weights = softplus(logits).sqrt_().gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True).add_(1e-20)
    return ids.to(torch.int32), weights.mul_(scale)


weigh_experts = on_cpu(_weigh_experts_cpu)(_weigh_experts)


def shared_expert(x: Tensor, weights: SharedExpertWeights, limit: float) -> Tensor:
    """`x [T, D] -> [T, D]`, both in the model dtype."""
    hidden = swiglu(linear(x, weights.w13), limit).to(x.dtype)
    return linear(hidden, weights.w2.weight)


def combine(pairs: Tensor) -> Tensor:
    """Add each token's expert rows: `[T, k, D]` in ascending expert id -> float32 `[T, D]`.

    One after the other in float32, so the result is the same wherever the rows came from.
    """
    total = pairs[:, 0].float()
    for k in range(1, pairs.shape[1]):
        total = total + pairs[:, k]
    return total


class ExpertBank(nn.Module):
    """The routed experts `expert_ids` of every layer."""

    def __init__(
        self,
        config: ModelConfig,
        expert_ids: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.expert_ids = tuple(expert_ids)
        self.device = device = torch.device(device)
        weights = [
            ExpertLayerWeights(config, len(self.expert_ids), dtype, device)
            for _ in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(weights)
        self._weights = tuple(weights)  # the same, typed
        self._slot_of_expert = self._slots()

    def take(self, other: "ExpertBank") -> None:
        """Hold its experts as well, in the memory where they are. Both are packed; nothing computes
        meanwhile."""
        if both := set(self.expert_ids) & set(other.expert_ids):
            raise ValueError(f"expert {min(both)} is held already")
        for mine, theirs in zip(self._weights, other._weights, strict=True):
            mine.hold((*mine.w13, *theirs.w13), (*mine.w2, *theirs.w2))
        self.expert_ids += other.expert_ids
        self._slot_of_expert = self._slots()

    def drop(self, expert_ids: Collection[int]) -> None:
        """Hold these no longer; their memory is free then. Packed, and nothing computes
        meanwhile."""
        kept = [slot for slot, e in enumerate(self.expert_ids) if e not in expert_ids]
        for held in self._weights:
            held.hold([held.w13[slot] for slot in kept], [held.w2[slot] for slot in kept])
        self.expert_ids = tuple(self.expert_ids[slot] for slot in kept)
        self._slot_of_expert = self._slots()

    def _slots(self) -> list[int]:
        slots = [-1] * self.config.n_routed_experts
        for slot, expert in enumerate(self.expert_ids):
            slots[expert] = slot
        return slots

    def forward(
        self, layer: int, rows: Tensor, row_index: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> Tensor:
        """One output row a (token, expert) pair, in the order of the pairs.

        Args:
            layer: which layer's experts.
            rows: `[N, D]` model dtype.
            row_index: `[P]` int64, the pair's row.
            expert_ids: `[P]` int64, the pair's expert (must be held).
            weights: `[P]` float32, applied to the hidden activation before w2, as the reference.

        Returns:
            `[P, D]` model dtype. An output row depends on its own pair alone.
        """
        held = self._weights[layer]
        experts = expert_ids.tolist()
        if not experts:
            return rows[:0]
        by_expert = sorted(range(len(experts)), key=experts.__getitem__)  # stable
        groups: list[tuple[int, int, int]] = []  # (slot, start, end) into the sorted pairs
        start = 0
        for expert, pairs in groupby(by_expert, key=experts.__getitem__):
            slot = self._slot_of_expert[expert]
            assert slot >= 0, f"this bank does not hold expert {expert}"
            end = start + len(list(pairs))
            groups.append((slot, start, end))
            start = end
        order = torch.tensor(by_expert, device=rows.device)
        x = rows.index_select(0, row_index.index_select(0, order))  # [P, D]
        gate_up = torch.cat([linear(x[a:b], held.w13[slot]) for slot, a, b in groups])  # [P, 2*I]
        hidden = swiglu(gate_up, self.config.swiglu_limit)
        hidden = hidden.mul_(weights.index_select(0, order).unsqueeze(-1)).to(rows.dtype)
        out = torch.cat([linear(hidden[a:b], held.w2[slot]) for slot, a, b in groups])
        return torch.empty_like(out).index_copy_(0, order, out)


def local_sum(bank: ExpertBank, call: ExpertCall) -> Tensor:
    """Answer an `ExpertCall` from a bank that holds all experts: float32 `[T, D]`."""
    tokens, k = call.expert_ids.shape
    row_index = torch.arange(tokens * k, device=call.rows.device) // k
    pairs = bank(
        call.layer,
        call.rows,
        row_index,
        call.expert_ids.flatten().long(),
        call.weights.flatten(),
    )
    return combine(pairs.unflatten(0, (tokens, k)))


@compiled
def _score(logit: np.float32) -> np.float32:
    soft = np.log1p(np.exp(-abs(logit))) + max(logit, np.float32(0.0))  # trap T11
    return np.float32(np.sqrt(soft))


@compiled
def _choose_rows(
    logits: Floats,
    bias: Floats,
    scale: np.float32,
    ids: npt.NDArray[np.int32],
    weights: Floats,
) -> None:
    tokens, num_experts = logits.shape
    ranks = np.empty(num_experts, np.float32)
    for t in range(tokens):
        for expert in range(num_experts):
            ranks[expert] = _score(logits[t, expert]) + bias[expert]
        for place in range(ids.shape[1]):
            best = ranks.argmax()
            ids[t, place] = best
            ranks[best] = -np.inf
    _weigh_rows_(logits, scale, ids, weights)


@compiled
def _weigh_rows_(
    logits: Floats, scale: np.float32, ids: npt.NDArray[np.int32], weights: Floats
) -> None:
    """Puts `ids` in ascending order."""
    for t in range(len(ids)):
        ids[t].sort()
        total = np.float32(0.0)
        for place in range(ids.shape[1]):
            weights[t, place] = _score(logits[t, ids[t, place]])
            total += weights[t, place]
        for place in range(ids.shape[1]):
            weights[t, place] = weights[t, place] / (total + np.float32(1e-20)) * scale
