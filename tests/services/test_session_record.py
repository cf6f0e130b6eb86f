"""A session record over the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.session_record import (
    SessionHead,
    SessionName,
    SessionRecord,
    record_from_wire,
    record_to_wire,
    without_salt,
)

TOKEN_IDS = st.lists(st.integers(0, 2**32 - 1), max_size=50).map(tuple)


@given(st.text(), st.text(), TOKEN_IDS, st.booleans())
def test_a_record_survives_the_wire(
    session_id: str, salt: str, token_ids: tuple[int, ...], is_deleted: bool
) -> None:
    head = SessionHead(
        name=SessionName(session_id, salt),
        version=2**40,
        num_tokens=len(token_ids),
        kv_root=b"r" * 32,
        created_s=1.5,
        last_used_s=2.5,
        pinned_until_s=3.5,
        worker="attention-0",
        is_deleted=is_deleted,
    )
    record = SessionRecord(head, token_ids)
    assert record_from_wire(record_to_wire(record)) == record


def test_a_record_that_lost_tokens_is_refused() -> None:
    message = record_to_wire(
        SessionRecord(SessionHead(name=SessionName("a", ""), version=1, num_tokens=2), (5, 6))
    )
    message.token_ids = message.token_ids[:4]
    with pytest.raises(ValueError, match="2 tokens has 1"):
        record_from_wire(message)


def test_the_salt_can_be_left_out() -> None:
    head = SessionHead(name=SessionName("a", "secret"), version=1, num_tokens=1)
    wire = record_to_wire(without_salt(SessionRecord(head, (5,))))
    assert b"secret" not in wire.SerializeToString()
    assert wire.session_id == "a"
