"""`model1 generate`: one prompt, answered by a running deployment or in this process."""

import json
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from cluster.access import Access
from cluster.client import End, Piece, Question, connected
from cluster.config import Settings
from cluster.local import ask_here
from services.generation import KvUsage


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    token_ids: tuple[int, ...]
    end: End

    def as_json(self) -> str:
        end = self.end
        usage = {
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "kv": None if end.kv is None else asdict(end.kv),
        }
        return json.dumps(
            {
                "text": self.text,
                "token_ids": self.token_ids,
                "finish_reason": end.finish_reason,
                "usage": usage,
            }
        )


async def generate(
    settings: Settings, question: Question, *, at: Access | None, as_json: bool
) -> None:
    """Stream the text to stdout as it comes, or print one JSON object at the end.

    At none: in this process.
    """
    if at is None:
        answer = await collect(ask_here(settings, question), echo=not as_json)
    else:
        async with connected(at) as client:
            answer = await collect(client.ask(question), echo=not as_json)
    end = answer.end
    if as_json:
        print(answer.as_json())
        return
    # Aside, so that stdout is the text and nothing else.
    print(end_line(end), file=sys.stderr)


def end_line(end: End) -> str:
    """How the answer ended, for people: what was restored of the prompt only if something was."""
    restored = [] if end.kv is None else _restored(end.kv)
    return (
        f"finish_reason {end.finish_reason}, prompt {end.prompt_tokens} tokens"
        + (f" ({', '.join(restored)})" if restored else "")
        + f", answer {end.completion_tokens} tokens"
    )


def _restored(kv: KvUsage) -> list[str]:
    return [
        f"{num_tokens} from {name.removesuffix('_tokens')}"
        for name, num_tokens in asdict(kv).items()
        if num_tokens and name != "computed_tokens"
    ]


async def collect(frames: AsyncIterator[Piece | End], *, echo: bool) -> Answer:
    """All of an answer; `echo` prints the text as it comes."""
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
