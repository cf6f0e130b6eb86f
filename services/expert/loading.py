"""From a checkpoint directory to a replica that holds some of its experts.

Takes the dtype by name, so that whoever starts replicas needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from model1.checkpoint import load_experts
from model1.modules import packed
from services.expert.replica import ExpertReplica

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_replica(
    directory: Path, *, name: str, expert_ids: Sequence[int], dtype: str, device: str
) -> ExpertReplica:
    """Reads the tensors of these experts and no others, and has computed with each of them. Raises
    a `ModelError`."""
    bank = packed(load_experts(directory, expert_ids, _DTYPES[dtype], device))
    replica = ExpertReplica(name, bank)
    replica.warm_up()
    return replica
