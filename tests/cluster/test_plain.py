"""Messages as plain values."""

import json

from cluster.plain import as_json, as_plain
from protos import control_pb2, kvstore_pb2, sessions_pb2


def test_numbers_are_numbers_and_names_are_words() -> None:
    stat = kvstore_pb2.KvTierStat(
        tier=kvstore_pb2.KV_TIER_COLD, used_bytes=2**40, damaged={"magic": 3, "key": 1}
    )
    plain = as_plain(stat)
    assert plain["tier"] == "cold"
    assert plain["used_bytes"] == 2**40
    assert plain["damaged"] == {"key": 1, "magic": 3}
    assert plain["blobs"] is None  # unset, and not 0
    assert plain["hits"] == 0


def test_messages_nest() -> None:
    answer = control_pb2.GetTopologyResponse(
        epoch=1, members=[control_pb2.Member(name="attention-0", requests=2**40)]
    )
    assert json.loads(as_json(answer)) == as_plain(answer)
    [member] = json.loads(as_json(answer))["members"]
    assert (member["name"], member["requests"], member["expert_group"]) == (
        "attention-0",
        2**40,
        None,
    )


def test_of_a_choice_the_others_are_none() -> None:
    part = sessions_pb2.ExportSessionResponse(
        history=sessions_pb2.SessionHistory(token_ids=[5], kv_root=b"\x01\xff")
    )
    plain = as_plain(part)
    assert plain["blob"] is None
    history = plain["history"]
    assert isinstance(history, dict)
    assert (history["token_ids"], history["kv_root"]) == ([5], "01ff")
