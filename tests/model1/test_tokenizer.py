"""Text round trip, the library as oracle, and streams that never cut a character."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from model1 import shipped_model_dir
from model1.errors import CheckpointError
from model1.tokenizer import BOS, EOS, Tokenizer

TEXTS = (
    "",
    "Once upon a time",
    "  two  spaces\n\nand lines\t",
    "naïve café, 日本語, Ελληνικά, 🦊🦊 ok",
    "<｜User｜>Where is Anna?<｜Assistant｜>",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(shipped_model_dir())


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(shipped_model_dir() / "tokenizer.json"))


def test_special_ids_are_deepseeks(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 4096)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_puts_begin_of_sentence_in_front_and_decode_drops_it(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    plain = text.replace("<｜User｜>", "").replace("<｜Assistant｜>", "")
    assert tokenizer.decode(ids) == plain


def test_chat_marks_in_text_become_their_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(f"{BOS}a{EOS}<｜User｜><｜Assistant｜>")[1:2] == [0]
    assert tokenizer.encode(f"a{EOS}<｜User｜><｜Assistant｜>")[-3:] == [1, 3, 4]


def test_decode_equals_the_library_on_any_ids(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    rng = random.Random(0)
    for _ in range(300):
        # Low ids are single bytes: most draws are broken UTF-8.
        ids = [rng.randrange(rng.choice((300, 4096))) for _ in range(rng.randrange(12))]
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_stream_pieces_are_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(rng.choice((300, 4096))) for _ in range(rng.randrange(12))]
        stream = tokenizer.stream()
        assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_emits_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert stream.flush() == ""


def test_a_cut_character_is_replaced_only_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("日")[1:]
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_importing_the_tokenizer_leaves_torch_out() -> None:
    code = "import sys, model1.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
