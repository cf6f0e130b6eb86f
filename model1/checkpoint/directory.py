"""A checkpoint directory as files: its config.json, and which file holds which tensor.

Says what is missing or unreadable by path. Knows nothing of torch or of tensor names.
"""

import json
from pathlib import Path
from typing import Any

from model1.config import ModelConfig
from model1.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` of a checkpoint directory, in either spelling."""
    path = _existing(directory) / CONFIG_FILE
    raw = _read_object(path)
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{path.parent}: {error}") from error


def tensor_files(directory: str | Path) -> dict[Path, frozenset[str] | None]:
    """The safetensors files and the tensors each holds; None where only the file itself knows."""
    root = _existing(directory)
    index = root / INDEX_FILE
    if not index.exists():
        if not (root / SINGLE_FILE).is_file():
            raise CheckpointError(f"{root} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return {root / SINGLE_FILE: None}
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # A shard lies beside its index: a path that leads elsewhere is damage or mischief.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index} places {name} in {file_name!r}, not a file name")
        files.setdefault(file_name, set()).add(name)
    return {root / file_name: frozenset(names) for file_name, names in files.items()}


def _existing(directory: str | Path) -> Path:
    root = Path(directory)
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {root} {what}")
    return root


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
