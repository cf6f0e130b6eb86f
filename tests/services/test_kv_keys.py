import itertools
import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv_keys import BLOCK_TOKENS, KEY_BYTES, KeyChain, root_key

MODEL = b"m" * 16
LAYOUT = b"l" * 16
ROOT = root_key(MODEL, LAYOUT)
TOKENS = list(range(1000, 1000 + 3 * BLOCK_TOKENS + 5))


def _chain(tokens: list[int], root: bytes = ROOT) -> KeyChain:
    chain = KeyChain(root)
    chain.extend(tokens)
    return chain


def test_keys_are_the_documented_hashes() -> None:
    """Spelt out with hashlib alone: keys outlive a release, in files and in other processes."""

    def digest(data: bytes) -> bytes:
        return blake2b(data, digest_size=32).digest()

    def prefixed(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    root = digest(b"".join(map(prefixed, (b"model1-kv-1", MODEL, LAYOUT, "acmé".encode()))))
    assert root_key(MODEL, LAYOUT, "acmé") == root
    chain = _chain(TOKENS, root)
    expected = root
    for i in range(3):
        assert chain.tail_key(i) == digest(b"tail" + expected)
        block = TOKENS[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]
        expected = digest(expected + struct.pack(f"<{BLOCK_TOKENS}I", *block))
        assert chain.body_keys[i] == expected
    assert chain.tail_key(3) == digest(b"tail" + expected)
    assert (len(chain.body_keys), chain.num_tokens) == (3, len(TOKENS))


@given(cuts=st.lists(st.integers(0, len(TOKENS))))
def test_keys_do_not_depend_on_how_the_history_arrived(cuts: list[int]) -> None:
    chain = KeyChain(root_key(MODEL, LAYOUT))
    edges = [0, *sorted(cuts), len(TOKENS)]
    for start, end in itertools.pairwise(edges):
        chain.extend(TOKENS[start:end])
    assert chain.body_keys == _chain(TOKENS).body_keys
    assert chain.num_tokens == len(TOKENS)


@given(position=st.integers(0, 3 * BLOCK_TOKENS - 1))
def test_another_token_changes_every_key_from_its_block_on(position: int) -> None:
    changed = list(TOKENS)
    changed[position] += 1
    ours, theirs = _chain(TOKENS), _chain(changed)
    block = position // BLOCK_TOKENS
    assert ours.body_keys[:block] == theirs.body_keys[:block]
    assert not set(ours.body_keys[block:]) & set(theirs.body_keys[block:])
    assert ours.tail_key(block) == theirs.tail_key(block)
    assert ours.tail_key(block + 1) != theirs.tail_key(block + 1)


def test_model_layout_and_salt_share_no_key() -> None:
    roots = [
        root_key(MODEL, LAYOUT),
        root_key(LAYOUT, MODEL),
        root_key(MODEL, b"L" * 16),
        root_key(MODEL, LAYOUT, "a"),
        root_key(MODEL, LAYOUT, "b"),
        # Length prefixes: what moves from one part to the next makes another root.
        root_key(MODEL + b"l", LAYOUT[1:]),
    ]
    keys = [key for root in roots for key in _chain(TOKENS, root).body_keys]
    assert len(set(roots)) == len(roots)
    assert len(set(keys)) == len(keys)


def test_no_body_has_the_key_of_a_tail() -> None:
    chain = _chain(TOKENS)
    tails = {chain.tail_key(i) for i in range(4)}
    assert len(tails) == 4
    assert not tails & {*chain.body_keys, root_key(MODEL, LAYOUT)}


def test_what_is_not_a_history_is_refused() -> None:
    chain = _chain(TOKENS)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"boundary {index} of a history of 3 whole blocks"):
            chain.tail_key(index)
    for token_id in (-1, 2**32):
        with pytest.raises(OverflowError):
            chain.extend([token_id])
    with pytest.raises(ValueError, match=f"{KEY_BYTES} bytes, got 3"):
        KeyChain(b"abc")
