"""Fills a `Trunk` or an `ExpertBank` from a checkpoint directory.

Decides which tensors a model must have, and says in one error everything that does not fit.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch

from model1.checkpoint.directory import load_config
from model1.checkpoint.tensors import CheckpointTensors
from model1.config import ModelConfig
from model1.errors import CheckpointError
from model1.moe import ExpertBank
from model1.trunk import Trunk

Shapes = dict[str, tuple[int, ...]]
_MAX_LISTED_PROBLEMS = 20


def load_trunk(directory: str | Path, dtype: torch.dtype, device: torch.device | str) -> Trunk:
    """Everything but the routed experts; their bytes are not read. For inference: no gradients."""
    config = load_config(directory)
    with CheckpointTensors(directory) as tensors:
        return read_trunk(tensors, config, dtype, device)


def load_experts(
    directory: str | Path,
    expert_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> ExpertBank:
    """The routed experts `expert_ids` of every layer; no other tensor's bytes are read."""
    with ExpertReader(directory, dtype, device) as reader:
        return reader.read(expert_ids)


class ExpertReader(AbstractContextManager["ExpertReader"]):
    """Routed experts of one checkpoint, some now and some later. Its files stay mapped and are
    checked once: the names of a large model take seconds, one expert's bytes do not."""

    def __init__(
        self, directory: str | Path, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._config = load_config(directory)
        self._tensors = CheckpointTensors(directory)
        self._dtype = dtype
        self._device = device
        self._checked: frozenset[str] = frozenset()  # names of tensors

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tensors.__exit__(exc_type, exc, traceback)

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read

    def read(self, expert_ids: Sequence[int]) -> ExpertBank:
        """These of every layer; no other tensor's bytes are read. Raises CheckpointError."""
        _check_ids(self._tensors, self._config, expert_ids)
        needed = _names_of_experts(self._tensors, self._config, expert_ids)
        if not self._checked.issuperset(needed):
            _check(self._tensors, self._config, needed)
            self._checked = frozenset(self._tensors.opened_names())
        bank = ExpertBank(self._config, expert_ids, dtype=self._dtype, device=self._device)
        _fill(bank, self._tensors)
        return bank.requires_grad_(False)


def read_trunk(
    tensors: CheckpointTensors,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Trunk:
    _check(tensors, config, list(_trunk_shapes(config)))
    trunk = Trunk(config, dtype=dtype, device=device)
    for name, parameter in trunk.state_dict().items():
        tensors.read_into(parameter, name)
    for layer, hashed in enumerate(config.hash_routed):
        if hashed:
            _check_hash_table(trunk, layer, tensors)
    return trunk.requires_grad_(False)


def _check_ids(tensors: CheckpointTensors, config: ModelConfig, expert_ids: Sequence[int]) -> None:
    if wrong := [e for e in expert_ids if not 0 <= e < config.n_routed_experts]:
        raise CheckpointError(
            f"{tensors.directory} has experts 0 to {config.n_routed_experts - 1}, not {wrong[0]}"
        )


def _names_of_experts(
    tensors: CheckpointTensors, config: ModelConfig, expert_ids: Sequence[int]
) -> list[str]:
    layers = range(config.num_hidden_layers)
    return [name for n in layers for name in _expert_names(tensors, n, expert_ids)]


def _fill(bank: ExpertBank, tensors: CheckpointTensors) -> None:
    width = bank.config.moe_intermediate_size
    state = bank.state_dict()
    for n in range(bank.config.num_hidden_layers):
        experts = f"layers.{n}.ffn.experts"
        for slot, expert in enumerate(bank.expert_ids):
            w13, w2 = state[f"layers.{n}.w13"][slot], state[f"layers.{n}.w2"][slot]
            if f"{experts}.w13" in tensors:
                tensors.read_into(w13, f"{experts}.w13", row=expert)
            else:
                tensors.read_into(w13[:width], f"{experts}.{expert}.w1.weight")
                tensors.read_into(w13[width:], f"{experts}.{expert}.w3.weight")
            if f"{experts}.w2" in tensors:
                tensors.read_into(w2, f"{experts}.w2", row=expert)
            else:
                tensors.read_into(w2, f"{experts}.{expert}.w2.weight")


def _trunk_shapes(config: ModelConfig) -> Shapes:
    trunk = Trunk(config, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in trunk.state_dict().items()}


def _expert_shapes(tensors: CheckpointTensors, config: ModelConfig) -> Shapes:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    num_experts = config.n_routed_experts
    by_leaf = {
        "w1.weight": (width, hidden),
        "w3.weight": (width, hidden),
        "w2.weight": (hidden, width),
        "w13": (num_experts, 2 * width, hidden),
        "w2": (num_experts, hidden, width),
    }
    return {
        name: by_leaf[name.split(".experts.")[1].lstrip("0123456789.")]
        for n in range(config.num_hidden_layers)
        for name in _expert_names(tensors, n, range(num_experts))
    }


def _expert_names(
    tensors: CheckpointTensors, layer: int, expert_ids: Sequence[int]
) -> Iterator[str]:
    """The tensors that hold these experts: stacked where the checkpoint stacks them."""
    experts = f"layers.{layer}.ffn.experts"
    for stacked, leaves in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        if f"{experts}.{stacked}" in tensors:
            yield f"{experts}.{stacked}"
        else:
            yield from (f"{experts}.{e}.{leaf}.weight" for e in expert_ids for leaf in leaves)


def _check(tensors: CheckpointTensors, config: ModelConfig, needed: Sequence[str]) -> None:
    """Raise one error that lists all that is missing, unexpected, repeated or misshapen.

    Names are compared for the whole model, shapes for what is needed and for whatever else lies
    in the same files: a replica must not have to open files that it does not need.
    """
    expected = _trunk_shapes(config) | _expert_shapes(tensors, config)
    missing = [name for name in expected if name not in tensors]
    unexpected = tensors.unexpected + [
        tensors.stored_name(name) for name in tensors.names() if name not in expected
    ]
    present = [name for name in needed if name in tensors]
    tensors.open_files_of(present)
    looked_at = [name for name in tensors.opened_names() if name in expected]
    for name in looked_at:
        tensors.refuse_quantised(name)
    misshapen = [
        f"{tensors.stored_name(name)} is {list(tensors.shape(name))}, not {list(expected[name])}"
        for name in looked_at
        if tensors.shape(name) != expected[name]
    ]
    problems = (
        [f"missing: {name}" for name in missing]
        + [f"unexpected: {name}" for name in unexpected]
        + [f"stored twice: {name}" for name in tensors.repeated]
        + [f"wrong shape: {line}" for line in misshapen]
    )
    if not problems:
        return
    listed = problems[:_MAX_LISTED_PROBLEMS]
    if len(problems) > len(listed):
        listed.append(f"and {len(problems) - len(listed)} more")
    raise CheckpointError(
        f"{tensors.directory}: tensors do not fit config.json ({len(missing)} missing, "
        f"{len(unexpected)} unexpected, {len(tensors.repeated)} stored twice, "
        f"{len(misshapen)} wrongly shaped)\n  " + "\n  ".join(listed)
    )


def _check_hash_table(trunk: Trunk, layer: int, tensors: CheckpointTensors) -> None:
    name = f"layers.{layer}.ffn.gate.tid2eid"
    table = trunk.state_dict()[name]
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= trunk.config.n_routed_experts:
        raise CheckpointError(
            f"{tensors.directory}: {tensors.stored_name(name)} holds expert "
            f"{low if low < 0 else high}, the model has {trunk.config.n_routed_experts}"
        )
