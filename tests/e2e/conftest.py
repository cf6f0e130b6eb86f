"""The tiny checkpoint, by name."""

from tests.tiny_checkpoint import tiny_checkpoint

__all__ = ["tiny_checkpoint"]
