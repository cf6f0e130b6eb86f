"""What is wrong before anything starts is told by the command in one line, with its exit code.

The many cases of flags and files are in tests/cluster; here are those that meet the machine.
"""

import shutil
import socket
from pathlib import Path

import pytest

from tests.e2e.command import Result, run


def failed(result: Result, code: int) -> str:
    """The one line on stderr."""
    assert (result.code, result.stdout) == (code, ""), result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_an_unknown_key_in_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "model1.yaml"
    file.write_text("topology: {expert_group: 2}")
    line = failed(run("serve", "--config", file), 2)
    assert "'topology.expert_group'" in line
    assert "'topology.expert_groups'" in line


def test_more_expert_groups_than_experts(tiny_checkpoint: Path) -> None:
    line = failed(run("serve", "--model", tiny_checkpoint, "--expert-groups", "5"), 2)
    assert "expert_groups 5" in line
    assert "4 experts" in line


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (("",), "the prompt is empty"),
        (("--token-ids", "5,272"), "272"),
        (("x" * 400,), "401 tokens"),
        (("x", "--max-tokens", "399"), "max_tokens 399"),
    ],
)
def test_a_prompt_that_the_model_cannot_take(
    tiny_checkpoint: Path, arguments: tuple[str, ...], value: str
) -> None:
    line = failed(run("generate", "--local", "--model", tiny_checkpoint, *arguments), 2)
    assert value in line


@pytest.mark.parametrize("verb", [("serve",), ("generate", "x", "--local")])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, verb: tuple[str, ...]) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in failed(run(*verb, "--model", missing), 1)


def test_a_damaged_safetensors_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(weights) in failed(run("serve", "--model", broken), 1)


def test_a_port_that_is_in_use(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = failed(run("serve", "--model", tiny_checkpoint, "--port", port), 1)
    assert f"port {port} is in use" in line


@pytest.mark.parametrize("verb", [("status",), ("generate", "x")])
def test_nobody_at_the_endpoint(verb: tuple[str, ...]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        assert endpoint in failed(run(*verb, "--endpoint", endpoint), 3)
