"""Muon's updates are orthogonal; every parameter has exactly one optimiser."""

import torch

from model1.moe import ExpertBank
from model1.train import optimiser
from model1.train.presets import NANO_CONFIG
from model1.trunk import Trunk


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 40), (40, 16), (3, 16, 24)):
        draw = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(optimiser.orthogonalise(draw))
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_each_parameter_but_gate_biases_and_the_look_back_has_one_optimiser() -> None:
    trunk = Trunk(NANO_CONFIG)
    bank = ExpertBank(NANO_CONFIG, range(NANO_CONFIG.n_routed_experts))
    named = [*trunk.named_parameters(), *bank.named_parameters()]
    owned = [
        id(parameter)
        for one in optimiser.build(named, weight_decay=0.0)
        for group in one.param_groups
        for parameter in group["params"]
    ]
    assert len(set(owned)) == len(owned)
    left = {name for name, parameter in named if id(parameter) not in set(owned)}
    assert set(optimiser.LOOK_BACK) <= left
    assert left - set(optimiser.LOOK_BACK) == {n for n, _ in named if n.endswith("gate.bias")}
