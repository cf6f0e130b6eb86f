"""The sizes of the values for real models are those that the program's own modules take.

Computed on modules without memory, from the configurations that the releases ship.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model1.config import ModelConfig
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVLayout, Unit
from model1.moe import ExpertBank
from model1.trunk import Trunk
from tests.helm.chart import CHART, container_of, render
from tests.helm.kuberay import num_bytes
from tests.model1.test_config import FLASH, PRO

GIB = 2**30
# What a GPU gives a process: 80 GiB, and 143,771 MiB.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "v4-flash": (FLASH, 80 * GIB),
    "v4-pro": (PRO, 143_771 * 2**20),
}
# For CUDA itself, rows and activations.
LEAST_SPARE_BYTES = 12 * GIB


def _num_bytes(module: torch.nn.Module) -> int:
    return sum(
        each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers())
    )


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_kv_fit_and_the_comments_say_what_they_take(name: str) -> None:
    raw, gpu_bytes = MODELS[name]
    config = ModelConfig.from_dict(raw)
    file = CHART / f"values-{name}.yaml"
    text, values = file.read_text(), yaml.safe_load(file.read_text())
    attention = values["settings"]["attention"]

    trunk_bytes = _num_bytes(Trunk(config, torch.bfloat16, "meta"))
    expert_bytes = _num_bytes(ExpertBank(config, range(1), torch.bfloat16, "meta"))
    num_in_group, rest = divmod(config.n_routed_experts, values["experts"]["groups"])
    assert rest == 0
    replica_bytes = num_in_group * expert_bytes
    copies = values["settings"]["cluster"]["expertRedundancy"]
    assert replica_bytes * (1 + copies) + LEAST_SPARE_BYTES <= gpu_bytes
    assert trunk_bytes + attention["kvBytes"] + LEAST_SPARE_BYTES <= gpu_bytes

    capacity = PoolCapacity.within(
        attention["kvBytes"],
        config,
        torch.bfloat16,
        max_sequences=attention["maxSequences"],
        max_step_tokens=attention["maxBatchTokens"],
    )
    layout = KVLayout.of(config, torch.bfloat16)
    block_bytes = layout.nbytes(Unit.BLOCK)
    ram_blocks = values["settings"]["kv"]["ramBytes"] // block_bytes
    for figure in (
        f"= {config.n_routed_experts * expert_bytes / 1e9:.1f} GB",
        f"{num_in_group} experts of {expert_bytes / 1e9:.2f} GB each",
        f"=  {replica_bytes / 1e9:.1f} GB a replica",
        f"{trunk_bytes / 1e9:.1f} GB a worker",
        f"of {gpu_bytes / 1e9:.1f} GB an expert replica",
        f"leaves {(gpu_bytes - replica_bytes) / 1e9:.1f} GB for rows",
        f"{block_bytes:,} bytes for a block of 128 tokens = {block_bytes // 128:,} a token",
        f"- {(gpu_bytes - trunk_bytes - attention['kvBytes']) / 1e9:.1f} GB for activations",
        f"sequences of {layout.nbytes(Unit.SLOT) / 1e6:.1f} MB",
        f"{capacity.num_units(layout)[Unit.PAGE]} pages of {layout.nbytes(Unit.PAGE) / 1e6:.1f} MB",
        f"{capacity.max_tokens:,} tokens",
        f"{capacity.max_tokens // attention['maxSequences']:,} for each of",
        f"{ram_blocks:,} blocks, {ram_blocks * 128 / 1e6:.1f} million tokens",
        f"{values['settings']['kv']['diskBytes'] * 128 // block_bytes // 10**6} million tokens",
    ):
        assert figure in text, figure


@pytest.mark.parametrize("name", [*MODELS, "laptop"])
def test_the_node_has_memory_for_the_ram_tier_and_what_is_on_its_way(name: str) -> None:
    file: Path = CHART / f"values-{name}.yaml"
    manifests = render(values=(file,))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]["kv"]
    kv = defaults | yaml.safe_load(file.read_text())["settings"]["kv"]
    limit = num_bytes(container_of(manifests, "attention")["resources"]["limits"]["memory"])
    assert kv["ramBytes"] + kv["stagingBytes"] + kv["maxWritebackBytes"] + GIB <= limit


@pytest.mark.parametrize("name", MODELS)
def test_every_replica_has_a_gpu(name: str) -> None:
    values = yaml.safe_load((CHART / f"values-{name}.yaml").read_text())
    experts, attention = values["experts"], values["attention"]
    # All actors of a node use its first GPU.
    assert (experts["group"]["slots"], experts["group"]["gpus"]) == (1, 1)
    assert (attention["group"]["slots"], attention["group"]["gpus"]) == (1, 1)
    # At the first start there are as many as are wanted.
    assert experts["groups"] * experts["replicas"] == experts["group"]["replicas"]
    assert attention["workers"] == attention["group"]["replicas"]
