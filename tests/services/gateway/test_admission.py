"""What a gateway lets in, and what it says about what it does not."""

from pathlib import Path

import pytest

from model1.errors import InvalidRequest
from model1.tokenizer import Tokenizer
from services.gateway.admission import (
    Admission,
    AskedRequest,
    AskedSampling,
    AskedStopping,
    ModelLimits,
)
from tests.services import tiny_model


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    limits = ModelLimits(
        vocab_size=tiny_model.VOCAB_SIZE,
        max_context_length=32,
        default_max_tokens=8,
        eos_token_ids=(1,),
    )
    return Admission(Tokenizer.from_dir(tiny_model.write_model_dir(tmp_path)), limits)


def test_what_is_left_open_is_settled(admission: Admission) -> None:
    request = admission.admit(AskedRequest(prompt="hello"))
    other = admission.admit(AskedRequest(prompt="hello"))
    assert request.token_ids[0] == 0
    assert len(request.token_ids) == 6
    assert request.max_tokens == 8
    assert request.stop_token_ids == {1}
    assert request.temperature == 0
    assert request.top_p == 1
    assert request.request_id != other.request_id
    assert request.seed != other.seed


def test_the_default_answer_length_ends_at_the_context(admission: Admission) -> None:
    assert admission.admit(AskedRequest(prompt=tiny_model.prompt(30))).max_tokens == 2


def test_a_turn_goes_on_from_the_history(admission: Admission) -> None:
    request = admission.admit(
        AskedRequest(prompt="hi", session_id="tea", cache_salt="mine"), history=(0, 7, 8, 1)
    )
    assert request.token_ids[:4] == (0, 7, 8, 1)
    assert 0 not in request.token_ids[4:]  # one begin-of-sentence a session
    assert (request.session_id, request.cache_salt) == ("tea", "mine")


def test_a_history_takes_its_room_of_the_context(admission: Admission) -> None:
    with pytest.raises(
        InvalidRequest, match=r"has 3 tokens after 30 of the session, the context is 32"
    ):
        admission.admit(AskedRequest(prompt=(5, 6, 7)), history=tiny_model.prompt(30))
    with pytest.raises(InvalidRequest, match=r"has 2 tokens after 30 of the session and fills"):
        admission.admit(AskedRequest(prompt=(5, 6)), history=tiny_model.prompt(30))


def test_what_is_asked_is_kept(admission: Admission) -> None:
    request = admission.admit(
        AskedRequest(
            prompt=(5, 6),
            request_id="mine",
            sampling=AskedSampling(temperature=0.7, top_p=0.9, top_k=4, seed=11),
            stopping=AskedStopping(max_tokens=3, stop_token_ids=(9,), ignore_eos=True),
        )
    )
    assert (request.request_id, request.token_ids, request.max_tokens) == ("mine", (5, 6), 3)
    assert request.stop_token_ids == {9}
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0.7, 0.9, 4, 11)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (AskedRequest(prompt=None), "the request has no prompt: set text or token_ids"),
        (AskedRequest(prompt=""), "the prompt is empty"),
        (AskedRequest(prompt=()), "the prompt is empty"),
        (
            AskedRequest(prompt=(3, 272)),
            "token id 272 in the prompt is outside the vocabulary of 272 tokens",
        ),
        (
            AskedRequest(prompt="a" * 2049),
            "the prompt has 2049 characters, more than a context of 32 tokens can hold",
        ),
        (
            AskedRequest(prompt="a" * 2048),
            "the prompt has 2049 tokens, the context is 32 tokens",
        ),
        (
            AskedRequest(prompt=tiny_model.prompt(33)),
            "the prompt has 33 tokens, the context is 32 tokens",
        ),
        (
            AskedRequest(prompt=tiny_model.prompt(32)),
            "the prompt has 32 tokens and fills the context of 32 tokens: there is no room for an "
            "answer",
        ),
        (
            AskedRequest(prompt=(3, 4), stopping=AskedStopping(max_tokens=31)),
            "max_tokens 31 and a prompt of 2 tokens exceed the context of 32 tokens",
        ),
        (
            AskedRequest(prompt=(3,), stopping=AskedStopping(max_tokens=0)),
            "max_tokens must be at least 1, not 0",
        ),
        (
            AskedRequest(prompt=(3,), stopping=AskedStopping(stop_token_ids=(4, 300))),
            "token id 300 in stop_token_ids is outside the vocabulary of 272 tokens",
        ),
        (
            AskedRequest(prompt=(3,), sampling=AskedSampling(temperature=-0.5)),
            "temperature must be between 0 and 100, not -0.5",
        ),
        (
            AskedRequest(prompt=(3,), sampling=AskedSampling(temperature=float("nan"))),
            "temperature must be between 0 and 100, not nan",
        ),
        (
            AskedRequest(prompt=(3,), sampling=AskedSampling(top_p=0.0)),
            "top_p must be above 0 and at most 1, not 0.0",
        ),
        (
            AskedRequest(prompt=(3,), sampling=AskedSampling(top_p=1.5)),
            "top_p must be above 0 and at most 1, not 1.5",
        ),
        (
            AskedRequest(prompt=(3,), request_id="x" * 129),
            "request_id must have 1 to 128 characters, not 129",
        ),
        (
            AskedRequest(prompt=(3,), request_id="a\nrequest_ended"),
            r"request_id 'a\nrequest_ended' has unprintable characters",
        ),
    ],
)
def test_a_bad_request_is_refused_by_name_and_bound(
    admission: Admission, asked: AskedRequest, words: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        admission.admit(asked)
    assert str(refused.value) == words
