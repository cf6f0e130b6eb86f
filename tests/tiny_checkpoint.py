"""A checkpoint directory that takes no time to load, for tests that start processes."""

from pathlib import Path

import pytest
import torch

from model1.checkpoint import save_checkpoint
from tests.services import tiny_model


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As training leaves it: random weights of every layer kind, and a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_model.model()
    save_checkpoint(directory, model.config, model.trunk, model.experts, torch.float32)
    return tiny_model.write_model_dir(directory)
