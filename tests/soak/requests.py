"""A session's turns as requests to an engine."""

from collections.abc import Sequence
from typing import NamedTuple

from services.attention.engine import Engine
from services.generation import GenerationRequest, KvUsage
from tests.soak.traffic import Session, said_so_far


def request(session: Session, answers: Sequence[Sequence[int]]) -> GenerationRequest:
    """The turn that follows on `answers`."""
    turn = session.turns[len(answers)]
    return GenerationRequest(
        request_id=f"{session.name}.{len(answers)}",
        token_ids=(*said_so_far(session, answers), *turn.prompt),
        max_tokens=turn.max_tokens,
        stop_token_ids=frozenset(),
        temperature=turn.temperature,
        top_p=turn.top_p,
        top_k=turn.top_k,
        seed=turn.seed,
        cache_salt=session.cache_salt,
        session_id=session.name,
    )


class Answer(NamedTuple):
    token_ids: tuple[int, ...]
    usage: KvUsage


async def answer(engine: Engine, asked: GenerationRequest) -> Answer:
    """Raises what ended the request, if it was not its last token."""
    token_ids: list[int] = []
    usage: KvUsage | None = None
    with engine.submit(asked) as stream:
        async for event in stream:
            token_ids += event.token_ids
            usage = event.kv_usage
    assert usage is not None
    return Answer(tuple(token_ids), usage)
