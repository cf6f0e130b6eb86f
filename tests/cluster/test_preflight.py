"""What is found wrong before any process starts."""

import shutil
import socket
from pathlib import Path

import pytest

from cluster.config import GatewaySettings, ModelSettings
from cluster.preflight import AddressTaken, check_addresses, checked_model
from model1.errors import CheckpointError


def test_a_whole_checkpoint_passes(tiny_checkpoint: Path) -> None:
    assert checked_model(ModelSettings(path=tiny_checkpoint)).n_routed_experts == 4


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        checked_model(ModelSettings(path=tmp_path / "missing"))


FILES = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_there_is_named(
    tiny_checkpoint: Path, tmp_path: Path, file: str
) -> None:
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        checked_model(ModelSettings(path=broken))


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_was_cut_off_is_named(tiny_checkpoint: Path, tmp_path: Path, file: str) -> None:
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=file):
        checked_model(ModelSettings(path=broken))


def test_a_free_port_passes_and_a_taken_one_is_named() -> None:
    check_addresses(GatewaySettings(port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressTaken, match=f"port {port} is in use"):
            check_addresses(GatewaySettings(port=port))
        with pytest.raises(AddressTaken, match=rf"{port} is in use; .* gateway\.metrics_port"):
            check_addresses(GatewaySettings(port=0, metrics_port=port))


def test_a_host_that_is_not_this_machine_is_named() -> None:
    with pytest.raises(AddressTaken, match="no-such-host"):
        check_addresses(GatewaySettings(host="no-such-host.invalid"))
