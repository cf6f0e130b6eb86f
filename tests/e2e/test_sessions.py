"""Sessions through the command line, over real Ray processes, and over a restart of all of them."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import Served, run_json, served, wait_until_gone
from tests.services import tiny_model

pytestmark = pytest.mark.timeout(300)

PROMPT = tiny_model.prompt(300)  # two whole blocks, and more
BLOCKS_TOKENS = 256
MAX_TOKENS = 8


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


def test_a_session_outlives_the_deployment(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--model", tiny_checkpoint, "--kv-path", tmp_path / "kv")
    session = ("--session", "tea")
    with served(*flags) as deployment:
        first = turn(deployment, PROMPT, *session)
        assert first["token_ids"] == generated(PROMPT)
        assert kv_tokens(first) == {"computed_tokens": len(PROMPT)}
        history = (*PROMPT, *first["token_ids"], 5, 6, 7)
        second = turn(deployment, (5, 6, 7), *session)
        assert second["token_ids"] == generated(history)
        left = len(history) - BLOCKS_TOKENS
        assert kv_tokens(second) == {"device_tokens": BLOCKS_TOKENS, "computed_tokens": left}
        pids = [member["pid"] for member in deployment.members()]
        stopped = deployment.stop()
    assert (stopped.code, stopped.stderr) == (0, "")
    wait_until_gone(pids)

    with served(*flags) as deployment:
        history = (*history, *second["token_ids"], 8)
        third = turn(deployment, (8,), *session)
        assert third["token_ids"] == generated(history)
        came_from = kv_tokens(third)
        assert came_from.pop("computed_tokens") == len(history) - BLOCKS_TOKENS
        # Prefetching began when the turn arrived, so that some of it may be in memory already.
        assert set(came_from) <= {"disk_tokens", "ram_tokens"}
        assert sum(came_from.values()) == BLOCKS_TOKENS
        assert deployment.stop().code == 0
