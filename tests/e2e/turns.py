"""Turns of a session through the command line, and what a process that knows no tier says."""

from typing import Any

from tests.e2e.command import Served, run_json
from tests.services import tiny_model

PROMPT = tiny_model.prompt(300)  # two whole blocks, and more
BLOCKS_TOKENS = 256
MAX_TOKENS = 8
SESSION = ("--session", "tea")


def turn(deployment: Served, prompt: tuple[int, ...], *flags: str) -> dict[str, Any]:
    answer: dict[str, Any] = run_json(
        *("generate", "--token-ids", ",".join(map(str, prompt)), "--max-tokens", str(MAX_TOKENS)),
        *("--endpoint", deployment.endpoint, *flags),
    )
    return answer


def generated(history: tuple[int, ...]) -> list[int]:
    """By one process that has never seen a tier."""
    return tiny_model.model().generate(history, max_tokens=MAX_TOKENS)


def kv_tokens(answer: dict[str, Any]) -> dict[str, int]:
    """What is not zero of where the prompt's KV came from."""
    return {name: num for name, num in answer["usage"]["kv"].items() if num}
