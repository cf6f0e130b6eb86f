"""What a gateway asks for is what the worker gets, field by field."""

from dataclasses import fields

from services.generation import (
    GenerationRequest,
    KvUsage,
    kv_usage_from_wire,
    kv_usage_to_wire,
    request_from_wire,
    request_to_wire,
)


def test_a_request_crosses_the_wire_whole() -> None:
    request = GenerationRequest(
        request_id="a",
        token_ids=(0, 5, 2**31),
        max_tokens=7,
        stop_token_ids=frozenset({1, 9}),
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=2**63 - 1,
        cache_salt="mine",
        session_id="tea",
    )
    assert request_from_wire(request_to_wire(request)) == request
    defaults = GenerationRequest(
        request_id="b", token_ids=(1,), max_tokens=1, stop_token_ids=frozenset()
    )
    for field in fields(request):  # one that is left out of the wire would pass as its default
        assert getattr(request, field.name) != getattr(defaults, field.name), field.name


def test_usage_crosses_the_wire_whole() -> None:
    usage = KvUsage(**{field.name: n for n, field in enumerate(fields(KvUsage), 1)})
    assert kv_usage_from_wire(kv_usage_to_wire(usage)) == usage
