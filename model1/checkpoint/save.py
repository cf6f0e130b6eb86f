"""Writes a checkpoint directory as transformers' `save_pretrained` does, so that it loads there.

Files appear whole or not at all: a reader or a crash never meets half of one.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model1.checkpoint.directory import CONFIG_FILE, SINGLE_FILE
from model1.checkpoint.names import keeps_float32, saved_name
from model1.config import ModelConfig
from model1.errors import CheckpointError
from model1.moe import ExpertBank
from model1.trunk import Trunk


def save_checkpoint(
    directory: str | Path, config: ModelConfig, trunk: Trunk, bank: ExpertBank, dtype: torch.dtype
) -> None:
    """Write `config.json` and `model.safetensors`; float32 parameters (spec 2.10) stay so."""
    if sorted(bank.expert_ids) != list(range(config.n_routed_experts)):
        raise CheckpointError(
            f"a checkpoint needs all {config.n_routed_experts} experts, "
            f"the bank holds {len(bank.expert_ids)}"
        )
    tensors = {
        saved_name(name): _stored(tensor, torch.float32 if keeps_float32(name) else dtype)
        for name, tensor in (trunk.state_dict() | _expert_tensors(config, bank)).items()
    }
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    settings = config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"

    weights_part, config_part = root / f".{SINGLE_FILE}.part", root / f".{CONFIG_FILE}.part"
    save_file(tensors, weights_part, metadata={"format": "pt"})
    config_part.write_text(text, encoding="utf-8")
    os.replace(weights_part, root / SINGLE_FILE)
    os.replace(config_part, root / CONFIG_FILE)


def _expert_tensors(config: ModelConfig, bank: ExpertBank) -> dict[str, Tensor]:
    state = bank.state_dict()
    tensors: dict[str, Tensor] = {}
    for n in range(config.num_hidden_layers):
        for slot, expert in enumerate(bank.expert_ids):
            w1, w3 = state[f"layers.{n}.w13"][slot].chunk(2)
            prefix = f"layers.{n}.ffn.experts.{expert}"
            tensors[f"{prefix}.w1.weight"] = w1
            tensors[f"{prefix}.w3.weight"] = w3
            tensors[f"{prefix}.w2.weight"] = state[f"layers.{n}.w2"][slot]
    return tensors


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A clone each: experts are slices of one stack, and safetensors refuses shared storage.
    target = dtype if tensor.is_floating_point() else torch.int64
    return tensor.detach().to(device="cpu", dtype=target, copy=True).contiguous()
