"""Reading and writing checkpoint directories: config.json and safetensors.

`load_config` needs no torch, so that a gateway or a router can ask what the model is; the rest
is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from model1.checkpoint.directory import load_config

if TYPE_CHECKING:
    from model1.checkpoint.digest import checkpoint_digest
    from model1.checkpoint.load import ExpertReader, load_experts, load_trunk
    from model1.checkpoint.save import save_checkpoint

__all__ = [
    "ExpertReader",
    "checkpoint_digest",
    "load_config",
    "load_experts",
    "load_trunk",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in ("ExpertReader", "load_experts", "load_trunk"):
        from model1.checkpoint import load

        return getattr(load, name)
    if name == "checkpoint_digest":
        from model1.checkpoint.digest import checkpoint_digest

        return checkpoint_digest
    if name == "save_checkpoint":
        from model1.checkpoint.save import save_checkpoint

        return save_checkpoint
    raise AttributeError(f"module 'model1.checkpoint' has no attribute {name!r}")
