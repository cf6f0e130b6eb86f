"""What can be known to be wrong before any process starts: checkpoint, address, numbers.

Reads headers only. Whatever it cannot see here, the roles report when they load.
"""

import errno
import socket
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cluster.access import accepted_tokens, process_tls
from cluster.config import GatewaySettings, ModelSettings, Settings
from model1 import shipped_model_dir
from model1.checkpoint import load_config
from model1.checkpoint.directory import tensor_files
from model1.config import ModelConfig
from model1.errors import CheckpointError
from model1.tokenizer import Tokenizer


class AddressTaken(Exception):
    """The gateway cannot listen where it was told to."""


def model_directory(settings: ModelSettings) -> Path:
    return settings.path or shipped_model_dir().absolute()


def checked_model(settings: ModelSettings) -> ModelConfig:
    """The model's configuration, once its files look whole. Raises a `ModelError`."""
    directory = model_directory(settings)
    config = load_config(directory)
    for file in tensor_files(directory):
        try:
            # Opening compares the header's offsets with the file's length.
            with safe_open(file, framework="numpy"):
                pass
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no {file.name}") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
    Tokenizer.from_dir(directory)
    return config


def check_secrets(settings: Settings) -> None:
    """Of this machine. Raises `TlsUnusable` and `TokensUnusable`."""
    if (tls := process_tls(settings.tls)) is not None:
        tls.check()
    accepted_tokens(settings.gateway)


def check_addresses(gateway: GatewaySettings) -> None:
    """Raises `AddressTaken` if nobody could listen there now."""
    _check(gateway.host, gateway.port, "choose another with --port")
    if gateway.metrics_port is not None:
        hint = "choose another gateway.metrics_port"
        _check(gateway.metrics_host, gateway.metrics_port, hint)


def _check(host: str, port: int, hint: str) -> None:
    endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AddressTaken(f"cannot listen on {endpoint}: {error.strerror}") from None
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            reason = (
                f"the port {port} is in use; {hint}, or 0 for any"
                if error.errno == errno.EADDRINUSE
                else error.strerror
            )
            raise AddressTaken(f"cannot listen on {endpoint}: {reason}") from None
