"""The parameters, under DeepSeek's own tensor names, and how they lie in memory.

`Trunk` and `ExpertBank` build on these. The dtype of each parameter is fixed here, once: what
the reference computes in float32 is kept in float32 whatever the model's dtype (spec 2.10).
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from model1.config import AttentionKind, ModelConfig
from model1.numerics import PackedMatrix, pack

Module = TypeVar("Module", bound=nn.Module)


class Weight(nn.Module):
    """A bare `weight` parameter, so that names read as in the checkpoint (`wq_a.weight`)."""

    weight: Tensor

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor)


class Matrix(Weight):
    """A weight `[N, K]` that rows are multiplied by."""

    def pack(self) -> None:
        _replace(self, "weight", pack(self.weight))


def _stack(
    rows: Sequence[int], columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Weight]]:
    """One tensor `[sum(rows), columns]`, and the weights that are its parts, one under the other.

    The parts are read and saved by their own names; the whole is what x is multiplied by, once.
    NOTE: the whole shares the parts' memory, so fill parameters in place and do not move modules.
    """
    whole = torch.empty(sum(rows), columns, dtype=dtype, device=device)
    return whole, [Weight(part) for part in whole.split(list(rows))]


def _replace(module: nn.Module, name: str, matrix: PackedMatrix | tuple[PackedMatrix, ...]) -> None:
    """`name` is declared as the plain tensor that it was; from now on it is for `linear` only."""
    delattr(module, name)
    setattr(module, name, matrix)


def packed(module: Module) -> Module:
    """`module` with every matrix packed for inference (`numerics.pack`).

    The plain parameters are given up, so that memory is not needed twice: the module computes as
    before, but can no longer be saved or trained.
    """
    for part in list(module.modules()):
        if isinstance(part, Packable):
            part.pack()
    return module


@runtime_checkable
class Packable(Protocol):
    """Parameters that know which of them are matrices."""

    def pack(self) -> None: ...


class CompressorWeights(nn.Module):
    """`width` = d_c for HCA, 2 * d_c for CSA (two overlapping series). All float32.

    `wkv_gate [2 * width, D]` is wkv over wgate.
    """

    def __init__(
        self, hidden: int, head_dim: int, width: int, ratio: int, device: torch.device
    ) -> None:
        super().__init__()
        f32 = torch.float32
        self.width = width
        self.num_series = width // head_dim
        self.wkv_gate, (self.wkv, self.wgate) = _stack((width, width), hidden, f32, device)
        self.ape = nn.Parameter(torch.empty(ratio, width, dtype=f32, device=device))
        self.norm = Weight(torch.empty(head_dim, dtype=f32, device=device))

    def pack(self) -> None:
        _replace(self, "wkv_gate", pack(self.wkv_gate))
        del self.wkv, self.wgate


class IndexerWeights(nn.Module):
    """The lightning indexer of a CSA layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Matrix(torch.empty(heads * dim, config.q_lora_rank, dtype=dtype, device=device))
        self.weights_proj = Matrix(
            torch.empty(heads, config.hidden_size, dtype=dtype, device=device)
        )
        self.compressor = CompressorWeights(
            config.hidden_size, dim, 2 * dim, config.csa_ratio, device
        )


class AttentionWeights(nn.Module):
    """One layer's attention; `compressor` and `indexer` exist only where the kind has them.

    `latents [q_lora + d, D]` is wq_a over wkv; `head_norms [H + 1, d]` is ones, for the queries,
    over kv_norm; `wo_a_of_group` are the blocks of wo_a.
    """

    def __init__(
        self, config: ModelConfig, kind: AttentionKind, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
        groups, rank, q_rank = config.o_groups, config.o_lora_rank, config.q_lora_rank

        def matrix(rows: int, columns: int) -> Matrix:
            return Matrix(torch.empty(rows, columns, dtype=dtype, device=device))

        def float32(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        self.latents, (self.wq_a, self.wkv) = _stack((q_rank, dim), hidden, dtype, device)
        self.q_norm = Weight(float32(q_rank))
        self.wq_b = matrix(heads * dim, q_rank)
        self.head_norms = torch.ones(heads + 1, dim, dtype=torch.float32, device=device)
        self.kv_norm = Weight(self.head_norms[-1])
        self.attn_sink = nn.Parameter(float32(heads))
        self.wo_a = Weight(
            torch.empty(groups * rank, heads * dim // groups, dtype=dtype, device=device)
        )
        self.wo_a_of_group = self.wo_a.weight.detach().split(rank)
        self.wo_b = matrix(hidden, groups * rank)
        if kind is AttentionKind.CSA:
            self.compressor = CompressorWeights(hidden, dim, 2 * dim, config.csa_ratio, device)
            self.indexer = IndexerWeights(config, dtype, device)
        elif kind is AttentionKind.HCA:
            self.compressor = CompressorWeights(hidden, dim, dim, config.hca_ratio, device)

    def pack(self) -> None:
        _replace(self, "latents", pack(self.latents))
        _replace(self, "wo_a_of_group", tuple(pack(block) for block in self.wo_a_of_group))
        del self.wq_a, self.wkv, self.wo_a


class GateWeights(nn.Module):
    """Router of one MoE layer: scores from `weight`, choice from `tid2eid` or by `bias`."""

    tid2eid: Tensor

    def __init__(self, config: ModelConfig, hashed: bool, device: torch.device) -> None:
        super().__init__()
        f32, experts = torch.float32, config.n_routed_experts
        self.is_hashed = hashed
        self.weight = nn.Parameter(
            torch.empty(experts, config.hidden_size, dtype=f32, device=device)
        )
        if hashed:
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64, device=device))
        else:
            self.bias = nn.Parameter(torch.empty(experts, dtype=f32, device=device))

    def pack(self) -> None:
        _replace(self, "weight", pack(self.weight))


class SharedExpertWeights(nn.Module):
    """The expert that every token passes: w1 = gate, w3 = up, w2 = down; `w13` is w1 over w3."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.w13, (self.w1, self.w3) = _stack((width, width), hidden, dtype, device)
        self.w2 = Matrix(torch.empty(hidden, width, dtype=dtype, device=device))

    def pack(self) -> None:
        _replace(self, "w13", pack(self.w13))
        del self.w1, self.w3


def _packed_alone(weight: Tensor) -> PackedMatrix:
    """In memory of its own, which is free again when this expert alone is dropped."""
    matrix = pack(weight)
    return weight.detach().clone() if matrix is weight else matrix


class ExpertLayerWeights(nn.Module):
    """The held routed experts of one layer: `w13 [E, 2*I, D]` (gate rows, then up), `w2`."""

    w13: Tensor | tuple[Tensor, ...]
    w2: Tensor | tuple[Tensor, ...]

    def __init__(
        self, config: ModelConfig, num_held: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.w13 = nn.Parameter(
            torch.empty(num_held, 2 * width, hidden, dtype=dtype, device=device)
        )
        self.w2 = nn.Parameter(torch.empty(num_held, hidden, width, dtype=dtype, device=device))

    def pack(self) -> None:
        self.hold([_packed_alone(w) for w in self.w13], [_packed_alone(w) for w in self.w2])

    def hold(self, w13: Sequence[PackedMatrix], w2: Sequence[PackedMatrix]) -> None:
        """These instead, one an expert."""
        _replace(self, "w13", tuple(w13))
        _replace(self, "w2", tuple(w2))


class FeedForwardWeights(nn.Module):
    """An MoE layer without its routed experts."""

    def __init__(
        self, config: ModelConfig, hashed: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.gate = GateWeights(config, hashed, device)
        self.shared_experts = SharedExpertWeights(config, dtype, device)
