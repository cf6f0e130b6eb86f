"""The tokenizer that training makes is the one that ships."""

import json

import pytest

from model1 import shipped_model_dir
from model1.train.tokenize import train_tokenizer


@pytest.mark.slow
def test_training_gives_the_shipped_tokenizer() -> None:
    shipped = json.loads((shipped_model_dir() / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(train_tokenizer().to_str()) == shipped
