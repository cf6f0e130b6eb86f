"""`model1 generate`: one prompt, answered by a running deployment or in this process."""

import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

from cluster.client import End, Piece, Question, connected
from cluster.config import Settings
from cluster.local import ask_here


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]
    end: End


async def generate(
    settings: Settings, question: Question, *, endpoint: str | None, as_json: bool
) -> None:
    """Stream the text to stdout as it comes, or print one JSON object at the end.

    No endpoint: in this process.
    """
    if endpoint is None:
        answer = await _collect(ask_here(settings, question), echo=not as_json)
    else:
        async with connected(endpoint) as client:
            answer = await _collect(client.ask(question), echo=not as_json)
    end = answer.end
    if as_json:
        usage = {
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.completion_tokens,
        }
        print(
            json.dumps(
                {
                    "text": answer.text,
                    "token_ids": answer.token_ids,
                    "finish_reason": end.finish_reason,
                    "usage": usage,
                }
            )
        )
        return
    # Aside, so that stdout is the text and nothing else.
    print(
        f"finish_reason {end.finish_reason}, prompt {end.prompt_tokens} tokens, answer "
        f"{end.completion_tokens} tokens",
        file=sys.stderr,
    )


async def _collect(frames: AsyncIterator[Piece | End], *, echo: bool) -> Answer:
    text: list[str] = []
    token_ids: list[int] = []
    end = None
    async for frame in frames:
        if isinstance(frame, End):
            end = frame
            continue
        text.append(frame.text)
        token_ids.extend(frame.token_ids)
        if echo:
            print(frame.text, end="", flush=True)
    if echo:
        print()
    assert end is not None, "the stream ended without Final and without a status"
    return Answer("".join(text), tuple(token_ids), end)
