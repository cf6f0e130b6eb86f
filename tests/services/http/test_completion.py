"""OpenAI's request and ours: what is taken, what is refused by name, and what is told."""

import pytest

from protos import inference_pb2
from services.http.completion import Completion, parsed
from services.http.errors import InvalidBody
from services.http.stop_texts import StopTexts


def test_what_is_set_reaches_the_gateway_and_what_is_not_stays_open() -> None:
    body = {"prompt": [1, 2], "max_tokens": 3, "temperature": 0, "top_p": 0.5, "seed": 2**63}
    wire = parsed({**body, "session_id": "s", "stop_token_ids": [7], "user": "u"}).to_wire("id")
    assert list(wire.token_ids.ids) == [1, 2]
    assert (wire.request_id, wire.session_id) == ("id", "s")
    assert (wire.sampling.temperature, wire.sampling.top_p, wire.sampling.seed) == (0, 0.5, 2**63)
    assert (wire.stopping.max_tokens, list(wire.stopping.stop_token_ids)) == (3, [7])
    bare = parsed({"prompt": ["text"], "n": 1, "logprobs": None, "echo": False}).to_wire("id")
    assert (bare.text, bare.sampling.temperature) == ("text", 1.0)
    assert not bare.stopping.HasField("max_tokens")
    assert not bare.sampling.HasField("seed")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "not a JSON object"),
        ({}, "prompt: Field required"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "one prompt a request, not 2"),
        ({"prompt": [-1]}, "prompt: -1 is not a token id"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: Input should be greater than"),
        ({"prompt": "a", "temperature": -1}, "temperature: Input should be greater than"),
        ({"prompt": "a", "top_p": 0}, "top_p: Input should be greater than 0"),
        ({"prompt": "a", "seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"prompt": "a", "n": 2}, "n is not supported: leave it out, or None or 1"),
        ({"prompt": "a", "logprobs": 5}, "logprobs is not supported"),
        ({"prompt": "a", "max_token": 5}, "unknown field 'max_token'"),
        ({"prompt": "a", "stop": ["a"] * 5}, "at most 4 texts"),
        ({"prompt": "a", "stop": ""}, "none of them empty"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body: object, words: str) -> None:
    with pytest.raises(InvalidBody, match=words):
        parsed(body).to_wire("id")


def test_no_beginning_of_a_stop_text_is_told_too_early() -> None:
    stops = StopTexts(["END", "\n\n"])
    assert [stops.passed(text) for text in ("a\n", "bE", "N", "Xc", "E", "ND more")] == [
        "a",
        "\nb",
        "",
        "ENXc",
        "",
        "",
    ]
    assert stops.was_met
    held = StopTexts(["END"])
    assert (held.passed("the E"), held.rest(), held.was_met) == ("the ", "E", False)


def test_an_answer_in_chunks_is_the_whole_answer() -> None:
    completion = Completion(parsed({"prompt": "a", "return_token_ids": True}), "id", "nano")
    Delta, Final = inference_pb2.Delta, inference_pb2.Final
    usage = inference_pb2.Usage(prompt_tokens=2, completion_tokens=3)
    frames = [
        inference_pb2.GenerateStreamResponse(accepted=inference_pb2.Accepted()),
        inference_pb2.GenerateStreamResponse(delta=Delta(token_ids=[1, 2], text="one ")),
        inference_pb2.GenerateStreamResponse(delta=Delta(token_ids=[3], text="two")),
        inference_pb2.GenerateStreamResponse(
            final=Final(finish_reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage)
        ),
    ]
    chunks = [chunk for frame in frames if (chunk := completion.chunk(frame))]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["one ", "two", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    whole = completion.whole()
    assert whole["choices"][0] == {
        "index": 0,
        "text": "one two",
        "logprobs": None,
        "finish_reason": "length",
        "token_ids": [1, 2, 3],
    }
    assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
