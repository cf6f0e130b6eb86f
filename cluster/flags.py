"""What the verbs' flags have in common: their values' types, and those that several verbs take.

A flag that sets a key of the settings has that key as its destination.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from cluster.config import Settings, load_settings

if TYPE_CHECKING:
    from cluster.access import Access

Arguments = argparse.Namespace
Value = TypeVar("Value", int, float)

_SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES_OF_UNIT = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Verb(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], None]


def add_deployment_flags(parser: argparse.ArgumentParser) -> None:
    add_flag(parser, "--model", "model.path", "DIR", "checkpoint; default: the shipped one")
    add_flag(parser, "--dtype", "model.dtype", "NAME", "float32 or bfloat16")
    add_flag(parser, "--device", "model.device", "NAME", "cpu or cuda")
    add_flag(parser, "--attention-workers", "topology.attention_workers", "N")
    add_flag(parser, "--expert-groups", "topology.expert_groups", "G", "the experts in G parts")
    add_flag(parser, "--expert-replicas", "topology.expert_replicas", "R", "of each group")
    add_flag(parser, "--kv-path", "kv.disk_path", "DIR", "KV and sessions outlive the deployment")
    add_flag(parser, "--host", "gateway.host", "HOST")
    add_flag(parser, "--port", "gateway.port", "P", "0: any free one")
    add_flag(parser, "--ray-address", "cluster.ray_address", "ADDR", "default: a Ray of its own")
    add_config_flag(parser)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=positive, metavar="N")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T")
    parser.add_argument("--top-p", type=probability, default=1.0, metavar="P")
    parser.add_argument("--seed", type=seed, metavar="S")


def add_salt_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-salt",
        type=text,
        default="",
        metavar="SALT",
        help="share KV and sessions with it alone",
    )


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", type=endpoint, metavar="HOST:PORT", help="of the gateway")
    add_format_flag(parser)
    add_config_flag(parser)


def add_format_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table")


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML; MODEL1_SECTION__KEY and flags win"
    )


def add_flag(
    parser: argparse.ArgumentParser, flag: str, key: str, metavar: str, text: str | None = None
) -> None:
    parser.add_argument(flag, dest=key, metavar=metavar, help=text)


def settings_of(parsed: Arguments, *, defaults: dict[str, object] | None = None) -> Settings:
    flags = {key: value for key, value in vars(parsed).items() if "." in key and value is not None}
    return load_settings(parsed.config, flags=flags, defaults=defaults)


def access_of(parsed: Arguments) -> "Access":
    from cluster.access import access  # imports gRPC

    return access(settings_of(parsed), parsed.endpoint)


def wants_json(parsed: Arguments) -> bool:
    return bool(parsed.format == "json")


def text(value: str) -> str:
    """What can be sent: a shell hands over any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def token_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,3") from None
    if wrong := [token_id for token_id in ids if not 0 <= token_id < 2**32]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is not a token id")
    return ids


def positive(text: str) -> int:
    return _number(text, int, "a whole number from 1 up", lambda value: 1 <= value < 2**32)


def natural(text: str) -> int:
    return _number(text, int, "a whole number from 0 up", lambda value: 0 <= value < 2**32)


def seed(text: str) -> int:
    return _number(text, int, "a whole number below 2**64", lambda value: 0 <= value < 2**64)


def temperature(text: str) -> float:
    return _number(
        text, float, "0 (greedy) or more", lambda value: math.isfinite(value) and value >= 0
    )


def probability(text: str) -> float:
    return _number(text, float, "above 0 and at most 1", lambda value: 0 < value <= 1)


def above_zero(text: str) -> float:
    return _number(text, float, "above 0 and below 1e9", lambda value: 0 < value < 1e9)


def ratio(text: str) -> float:
    return _number(text, float, "0 or more", lambda value: math.isfinite(value) and value >= 0)


def seconds(text: str) -> float:
    """90, 90s, 15m, 2h, 7d."""
    number, factor = _unit(text, _SECONDS_OF_UNIT)
    wanted = "a time above 0 such as 90s, 15m, 2h or 7d"
    return factor * _number(number, float, wanted, lambda value: 0 < value < math.inf)


def minutes(text: str) -> float:
    return _number(text, float, "above 0", lambda value: 0 < value < math.inf)


def num_bytes(text: str) -> int:
    """1048576, 512KiB, 64MiB, 2GiB."""
    number, factor = _unit(text, _BYTES_OF_UNIT)
    wanted = "a size above 0 such as 1048576, 64MiB or 2GiB"
    return factor * _number(number, int, wanted, lambda value: 0 < value < 2**40)


def endpoint(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    return text


def _unit(text: str, factors: dict[str, int]) -> tuple[str, int]:
    for unit, factor in factors.items():
        if text.endswith(unit):
            return text.removesuffix(unit), factor
    return text, 1


def _number(
    text: str, convert: Callable[[str], Value], wanted: str, is_right: Callable[[Value], bool]
) -> Value:
    try:
        value = convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}") from None
    if not is_right(value):
        raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
    return value
