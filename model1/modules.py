"""The parameters, under DeepSeek's own tensor names, and nothing that computes.

`Trunk` and `ExpertBank` build on these. The dtype of each parameter is fixed here, once: what
the reference computes in float32 is kept in float32 whatever the model's dtype (spec 2.10).
"""

import torch
from torch import nn

from model1.config import AttentionKind, ModelConfig


class Weight(nn.Module):
    """A bare `weight` parameter, so that names read as in the checkpoint (`wq_a.weight`)."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class CompressorWeights(nn.Module):
    """`width` = d_c for HCA, 2 * d_c for CSA (two overlapping series). All float32."""

    def __init__(
        self, hidden: int, head_dim: int, width: int, ratio: int, device: torch.device
    ) -> None:
        super().__init__()
        f32 = torch.float32
        self.wkv = Weight(width, hidden, dtype=f32, device=device)
        self.wgate = Weight(width, hidden, dtype=f32, device=device)
        self.ape = nn.Parameter(torch.empty(ratio, width, dtype=f32, device=device))
        self.norm = Weight(head_dim, dtype=f32, device=device)


class IndexerWeights(nn.Module):
    """The lightning indexer of a CSA layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = Weight(heads * dim, config.q_lora_rank, dtype=dtype, device=device)
        self.weights_proj = Weight(heads, config.hidden_size, dtype=dtype, device=device)
        self.compressor = CompressorWeights(
            config.hidden_size, dim, 2 * dim, config.csa_ratio, device
        )


class AttentionWeights(nn.Module):
    """One layer's attention; `compressor` and `indexer` exist only where the kind has them."""

    def __init__(
        self, config: ModelConfig, kind: AttentionKind, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
        groups, rank = config.o_groups, config.o_lora_rank
        f32 = torch.float32
        self.wq_a = Weight(config.q_lora_rank, hidden, dtype=dtype, device=device)
        self.q_norm = Weight(config.q_lora_rank, dtype=f32, device=device)
        self.wq_b = Weight(heads * dim, config.q_lora_rank, dtype=dtype, device=device)
        self.wkv = Weight(dim, hidden, dtype=dtype, device=device)
        self.kv_norm = Weight(dim, dtype=f32, device=device)
        self.attn_sink = nn.Parameter(torch.empty(heads, dtype=f32, device=device))
        self.wo_a = Weight(groups * rank, heads * dim // groups, dtype=dtype, device=device)
        self.wo_b = Weight(hidden, groups * rank, dtype=dtype, device=device)
        if kind is AttentionKind.CSA:
            self.compressor = CompressorWeights(hidden, dim, 2 * dim, config.csa_ratio, device)
            self.indexer = IndexerWeights(config, dtype, device)
        elif kind is AttentionKind.HCA:
            self.compressor = CompressorWeights(hidden, dim, dim, config.hca_ratio, device)


class GateWeights(nn.Module):
    """Router of one MoE layer: scores from `weight`, choice from `tid2eid` or by `bias`."""

    def __init__(self, config: ModelConfig, hashed: bool, device: torch.device) -> None:
        super().__init__()
        f32, experts = torch.float32, config.n_routed_experts
        self.weight = nn.Parameter(
            torch.empty(experts, config.hidden_size, dtype=f32, device=device)
        )
        if hashed:
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64, device=device))
        else:
            self.bias = nn.Parameter(torch.empty(experts, dtype=f32, device=device))


class SharedExpertWeights(nn.Module):
    """The expert that every token passes: w1 = gate, w3 = up, w2 = down."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.w1 = Weight(width, hidden, dtype=dtype, device=device)
        self.w3 = Weight(width, hidden, dtype=dtype, device=device)
        self.w2 = Weight(hidden, width, dtype=dtype, device=device)


class FeedForwardWeights(nn.Module):
    """An MoE layer without its routed experts."""

    def __init__(
        self, config: ModelConfig, hashed: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.gate = GateWeights(config, hashed, device)
        self.shared_experts = SharedExpertWeights(config, dtype, device)
