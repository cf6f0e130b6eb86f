"""model1: the DeepSeek-V4-architecture model in plain torch.

`Model` is imported on first use, so that processes which only tokenize never load torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model1.model import Model

__all__ = ["Model", "shipped_model_dir"]


def shipped_model_dir() -> Path:
    """Directory of the small trained checkpoint that comes with the package."""
    return Path(__file__).parent / "assets" / "nano"


def __getattr__(name: str) -> Any:
    if name == "Model":
        from model1.model import Model

        return Model
    raise AttributeError(f"module 'model1' has no attribute {name!r}")
