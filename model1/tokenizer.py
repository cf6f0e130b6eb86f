"""Text to token ids and back, over the checkpoint's tokenizer.json.

Owns the begin-of-sentence rule and the bytes of every token, so that a stream never emits half a
character. Byte-level BPE only, as DeepSeek ships. Knows nothing of torch (the gateway imports this)
nor of the model.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import tokenizers

from model1.errors import CheckpointError

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"


class Tokenizer:
    """Special tokens are recognised in text when encoding and left out when decoding."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.bos_id = self._special_id(BOS)
        self.eos_id = self._special_id(EOS)
        self._token_bytes = _token_bytes(backend)

    @classmethod
    def from_dir(cls, directory: Path | str) -> "Tokenizer":
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer at {path}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        return len(self._token_bytes)

    def encode(self, text: str, *, goes_on: bool = False) -> list[int]:
        """Ids with begin-of-sentence in front, unless the text goes on from earlier ids."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids if goes_on else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Empty for special tokens, and for ids that a padded vocabulary leaves unnamed."""
        return self._token_bytes.get(token_id, b"")

    def stream(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def _special_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no {token!r}")
        return int(token_id)


class StreamDecoder:
    """Turns one token at a time into text, never half a character.

    The pieces of `push` and the last one of `flush` put together are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is now certain; empty while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is still held when the stream ends: U+FFFD for half a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _token_bytes(backend: tokenizers.Tokenizer) -> dict[int, bytes]:
    byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    table: dict[int, bytes] = {}
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id in special:
            table[token_id] = b""
        elif all(char in byte_of for char in token):
            table[token_id] = bytes(byte_of[char] for char in token)
        else:  # an added token in plain text
            table[token_id] = token.encode()
    return table


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte.

    Printable Latin-1 stands for itself; the other bytes get the characters from U+0100 on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]
