"""Names KV blocks by what they hold: a hash chain over the token history, 32 bytes a key.

    root        = H(version, model digest, layout digest, cache salt)   each length-prefixed
    chain_0     = root
    chain_(i+1) = H(chain_i, token ids of block i)                      names the body of block i
    tail_i      = H("tail", chain_i)                                    resumes at i * block_tokens

Equal keys mean equal history, model, layout and salt: sequences with a common prefix share blocks,
and tenants with different salts share none. Knows neither blobs nor tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

KEY_BYTES = 32
DIGEST_BYTES = 16  # of a model, of a layout
BLOCK_TOKENS = 128

_CHAIN_VERSION = b"model1-kv-1"
_TAIL = b"tail"
_TOKEN_DTYPE = np.dtype("<u4")


def root_key(model_digest: bytes, layout_digest: bytes, cache_salt: str = "") -> bytes:
    """The start of every chain of one model in one layout for one tenant."""
    parts = (_CHAIN_VERSION, model_digest, layout_digest, cache_salt.encode())
    return _hash(*(piece for part in parts for piece in (len(part).to_bytes(8, "little"), part)))


class KeyChain:
    """The keys of one growing token history. Give it every token once, in order."""

    def __init__(self, root: bytes, *, block_tokens: int = BLOCK_TOKENS) -> None:
        if len(root) != KEY_BYTES:
            raise ValueError(f"a chain starts with a key of {KEY_BYTES} bytes, got {len(root)}")
        self.body_keys: list[bytes] = []
        self._root = root
        self._block_bytes = block_tokens * _TOKEN_DTYPE.itemsize
        self._open = bytearray()  # the token ids after the last whole block

    @property
    def num_tokens(self) -> int:
        whole = len(self.body_keys) * self._block_bytes
        return (whole + len(self._open)) // _TOKEN_DTYPE.itemsize

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append to the history; every block that becomes whole gets its key."""
        self._open += np.asarray(token_ids, dtype=_TOKEN_DTYPE).tobytes()
        num_whole = len(self._open) // self._block_bytes * self._block_bytes
        for start in range(0, num_whole, self._block_bytes):
            tokens = self._open[start : start + self._block_bytes]
            self.body_keys.append(_hash(self._chain(len(self.body_keys)), tokens))
        del self._open[:num_whole]

    def tail_key(self, index: int) -> bytes:
        """Key of what resuming at position `index * block_tokens` needs beside earlier bodies.

        Raises IndexError for a boundary that the history has not reached.
        """
        return _hash(_TAIL, self._chain(index))

    def _chain(self, index: int) -> bytes:
        if not 0 <= index <= len(self.body_keys):
            raise IndexError(f"boundary {index} of a history of {len(self.body_keys)} whole blocks")
        return self.body_keys[index - 1] if index else self._root


def _hash(*parts: bytes | bytearray) -> bytes:
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
