"""A checkpoint's digest tells models apart, however their files are cut."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model1.checkpoint import checkpoint_digest
from model1.checkpoint.directory import INDEX_FILE, SINGLE_FILE
from model1.errors import CheckpointError
from tests.services import tiny_model
from tests.tiny_checkpoint import tiny_checkpoint as tiny_checkpoint

Tensors = dict[str, Tensor]
BIG = "model.layers.1.mlp.experts.0.w1.weight"


@pytest.fixture
def tensors(tiny_checkpoint: Path) -> Tensors:
    return load_file(tiny_checkpoint / SINGLE_FILE) | {
        BIG: torch.arange(100_000, dtype=torch.float32)
    }


def write(directory: Path, tensors: Tensors, *, shards: int = 0) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(tiny_model.CONFIG.to_dict()))
    if not shards:
        save_file(tensors, directory / SINGLE_FILE)
        return directory
    weight_map = {name: f"{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file_name in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == file_name}
        save_file(part, directory / file_name)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_the_same_weights_are_the_same_model_in_any_files(tensors: Tensors, tmp_path: Path) -> None:
    digest = checkpoint_digest(write(tmp_path / "one", tensors))
    assert len(digest) == 16
    backwards = dict(reversed([*tensors.items()]))
    assert checkpoint_digest(write(tmp_path / "again", backwards)) == digest
    assert checkpoint_digest(write(tmp_path / "cut", tensors, shards=3)) == digest


@pytest.mark.parametrize(
    "change",
    (
        lambda t: t.pop(BIG),
        lambda t: t.update(more=torch.zeros(1)),
        lambda t: t.update({BIG: t[BIG].view(1000, 100)}),
        lambda t: t.update({BIG: t[BIG].view(torch.int32)}),
        lambda t: t.update({BIG: t[BIG] * 1.001}),
        lambda t: t[BIG][:1].add_(1),
        lambda t: t[BIG][-1:].add_(1),
        lambda t: t["model.norm.weight"][5].add_(1),
    ),
    ids=("gone", "more", "shape", "dtype", "trained", "first", "last", "one of a small tensor"),
)
def test_another_tensor_is_another_model(
    tensors: Tensors, tmp_path: Path, change: Callable[[Tensors], object]
) -> None:
    digest = checkpoint_digest(write(tmp_path / "before", tensors))
    change(tensors)
    assert checkpoint_digest(write(tmp_path / "after", tensors)) != digest


def test_another_config_is_another_model(tensors: Tensors, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", tensors)
    digest = checkpoint_digest(directory)
    raw = (directory / "config.json").read_text()
    (directory / "config.json").write_text(json.dumps(json.loads(raw), indent=4))
    assert checkpoint_digest(directory) == digest
    other = replace(tiny_model.CONFIG, index_topk=5)
    (directory / "config.json").write_text(json.dumps(other.to_dict()))
    assert checkpoint_digest(directory) != digest


def test_of_an_absent_shard_only_the_names_count(tensors: Tensors, tmp_path: Path) -> None:
    digests = set()
    for name, value in (("a", 1.0), ("b", 2.0)):
        tensors[BIG].fill_(value)
        directory = write(tmp_path / name, tensors, shards=len(tensors))
        digests.add(checkpoint_digest(directory))
        (directory / f"{list(tensors).index(BIG)}.safetensors").unlink()
        digests.add(checkpoint_digest(directory))
    assert len(digests) == 3


@pytest.mark.parametrize(
    "damage",
    (
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\xff" * 100),
        lambda p: p.write_bytes(p.read_bytes()[:-10]),
        lambda p: p.write_bytes((3).to_bytes(8, "little") + b"[1]"),
        lambda p: p.write_bytes((10).to_bytes(8, "little") + b'{"a": {}}  '),
    ),
    ids=("empty", "no header", "cut", "a list", "no offsets"),
)
def test_damage_is_named_with_its_file(
    tensors: Tensors, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    directory = write(tmp_path / "model", tensors)
    damage(directory / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        checkpoint_digest(directory)


def test_the_digest_is_read_without_loading_torch(tiny_checkpoint: Path) -> None:
    script = (
        "import sys; from model1.checkpoint import checkpoint_digest; "
        f"checkpoint_digest({str(tiny_checkpoint)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
