"""The command line: verbs and flags in, an exit code out.

Reads the settings once and hands them down. A verb is one entry of `_VERBS`, and its work is
another module's, imported when it is asked for. Exit codes: 0 ok, 1 failed, 2 usage, 3 unreachable.
"""

import argparse
import asyncio
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from cluster.config import Settings, SettingsError, load_settings

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 0, 1, 2, 3

Arguments = argparse.Namespace
Value = TypeVar("Value", int, float)


class Verb(NamedTuple):
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Arguments], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, instead of the usage and then the line."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Whatever goes wrong is one message on stderr and an exit code."""
    parsed = _parser().parse_args(arguments)
    # Two compute threads collapse when anything else runs on a small machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        _VERBS[parsed.verb].run(parsed)
    except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        return _failed("interrupted", EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read our output has enough of it; flushing at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise  # a bug of ours: the traceback is what helps
        return _failed(str(error), code)
    return EXIT_OK


def _failed(message: str, code: int) -> int:
    print(f"model1: {message}", file=sys.stderr)
    return code


def _exit_code(error: Exception) -> int | None:
    # Here, so that a wrong flag is answered before gRPC and the rest are imported.
    if isinstance(error, SettingsError):
        return EXIT_USAGE
    from cluster.bench_child import ChildFailed
    from cluster.bench_workload import SidesDiffer
    from cluster.client import RequestFailed, RequestRefused, Unreachable
    from cluster.preflight import AddressTaken
    from cluster.ray_session import RayUnavailable
    from cluster.supervisor import DeploymentError
    from cluster.topology import TopologyError
    from model1.errors import InvalidRequest, ModelError

    if isinstance(error, Unreachable):
        return EXIT_UNREACHABLE
    if isinstance(error, TopologyError | InvalidRequest | RequestRefused):
        return EXIT_USAGE
    expected = (
        *(ModelError, DeploymentError, AddressTaken, RayUnavailable, RequestFailed),
        *(ChildFailed, SidesDiffer),
    )
    return EXIT_FAILED if isinstance(error, expected) else None


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    _add_deployment_flags(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask instead of the usual")


def _demo(parsed: Arguments) -> None:
    from cluster.demo import PROMPT, demo

    # Any free port, unless one is asked for: whatever else runs here is not disturbed.
    demo(_settings(parsed, defaults={"gateway.port": 0}), parsed.prompt or PROMPT)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    _add_deployment_flags(parser)


def _serve(parsed: Arguments) -> None:
    from cluster.serve import serve

    serve(_settings(parsed))


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("text", nargs="?", metavar="TEXT", help="the prompt; - reads stdin")
    prompt.add_argument(
        "--token-ids", type=_token_ids, metavar="1,2,3", help="the prompt as token ids, used as is"
    )
    parser.add_argument("--max-tokens", type=_positive, metavar="N")
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T")
    parser.add_argument("--top-p", type=_probability, default=1.0, metavar="P")
    parser.add_argument("--seed", type=_seed, metavar="S")
    parser.add_argument("--local", action="store_true", help="in this process, without a server")
    _add_flag(parser, "--model", "model.path", "DIR", "checkpoint of --local")
    _add_flag(parser, "--dtype", "model.dtype", "NAME", "of --local: float32 or bfloat16")
    _add_client_flags(parser)


def _generate(parsed: Arguments) -> None:
    from cluster.client import Question
    from cluster.generate import generate

    prompt = parsed.token_ids or (sys.stdin.read() if parsed.text == "-" else parsed.text)
    question = Question(
        prompt=prompt,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        seed=parsed.seed,
    )
    settings = _settings(parsed)
    endpoint = None if parsed.local else parsed.endpoint or settings.gateway.endpoint
    asyncio.run(generate(settings, question, endpoint=endpoint, as_json=_wants_json(parsed)))


def _status(parsed: Arguments) -> None:
    from cluster.status import status

    endpoint = parsed.endpoint or _settings(parsed).gateway.endpoint
    asyncio.run(status(endpoint, as_json=_wants_json(parsed)))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="nano", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=_positive, metavar="N", help="instead of the preset's")
    parser.add_argument("--resume", action="store_true", help="go on from what DIR holds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def _train(parsed: Arguments) -> None:
    from model1.train.loop import train

    train(parsed.preset, parsed.out, parsed.device, steps=parsed.steps, resume=parsed.resume)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="serve|model")
    words = "a deployment against one process, batch 32"
    serve = what.add_parser("serve", help=words, description=words)
    serve.add_argument("--pairs", type=_positive, default=5, metavar="N", help="runs of each side")
    words = "the forward pass against transformers'"
    model = what.add_parser("model", help=words, description=words)
    model.add_argument("--steps", type=_positive, default=20, metavar="N", help="timed, of each")
    model.add_argument("--quick", action="store_true", help="leave out the long context")
    for each in (serve, model):
        each.add_argument("--format", choices=("table", "json"), default="table")


def _bench(parsed: Arguments) -> None:
    if parsed.what == "serve":
        from cluster.bench_serve import bench_serve

        bench_serve(num_pairs=parsed.pairs, as_json=_wants_json(parsed))
    else:
        import model1.bench

        model1.bench.run(parsed.steps, _wants_json(parsed), long_context=not parsed.quick)


_VERBS = {
    "demo": Verb("run a whole deployment here, ask it one thing, stop", _demo_arguments, _demo),
    "serve": Verb("run a deployment until SIGTERM", _serve_arguments, _serve),
    "generate": Verb("answer one prompt", _generate_arguments, _generate),
    "status": Verb("show what a deployment consists of", lambda p: _add_client_flags(p), _status),
    "bench": Verb("measure on random weights of the mini model", _bench_arguments, _bench),
    "train": Verb("train a small model from scratch", _train_arguments, _train),
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="model1",
        description="Serve DeepSeek-V4-architecture models on Ray, over gRPC.",
        epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 unreachable. Every key of the config file "
        "is also an environment variable: gateway.port is MODEL1_GATEWAY__PORT.",
    )
    version = importlib.metadata.version("model1")
    parser.add_argument("--version", action="version", version=f"model1 {version}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in _VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.help, description=verb.help))
    return parser


def _add_deployment_flags(parser: argparse.ArgumentParser) -> None:
    _add_flag(parser, "--model", "model.path", "DIR", "checkpoint; default: the shipped one")
    _add_flag(parser, "--dtype", "model.dtype", "NAME", "float32 or bfloat16")
    _add_flag(parser, "--device", "model.device", "NAME", "cpu or cuda")
    _add_flag(parser, "--attention-workers", "topology.attention_workers", "N")
    _add_flag(parser, "--expert-groups", "topology.expert_groups", "G", "the experts in G parts")
    _add_flag(parser, "--expert-replicas", "topology.expert_replicas", "R", "of each group")
    _add_flag(parser, "--host", "gateway.host", "HOST")
    _add_flag(parser, "--port", "gateway.port", "P", "0: any free one")
    _add_flag(parser, "--ray-address", "cluster.ray_address", "ADDR", "default: a Ray of its own")
    _add_config_flag(parser)


def _add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", type=_endpoint, metavar="HOST:PORT", help="of the gateway")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    _add_config_flag(parser)


def _add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML; flags override it")


def _add_flag(
    parser: argparse.ArgumentParser, flag: str, key: str, metavar: str, text: str | None = None
) -> None:
    # The key is the destination, so that the settings can be read off the parsed flags.
    parser.add_argument(flag, dest=key, metavar=metavar, help=text)


def _settings(parsed: Arguments, *, defaults: dict[str, object] | None = None) -> Settings:
    flags = {key: value for key, value in vars(parsed).items() if "." in key and value is not None}
    return load_settings(parsed.config, flags=flags, defaults=defaults)


def _wants_json(parsed: Arguments) -> bool:
    return bool(parsed.format == "json")


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,3") from None
    if wrong := [token_id for token_id in ids if not 0 <= token_id < 2**32]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is not a token id")
    return ids


def _positive(text: str) -> int:
    return _number(text, int, "a whole number from 1 up", lambda value: 1 <= value < 2**32)


def _seed(text: str) -> int:
    return _number(text, int, "a whole number below 2**64", lambda value: 0 <= value < 2**64)


def _temperature(text: str) -> float:
    return _number(
        text, float, "0 (greedy) or more", lambda value: math.isfinite(value) and value >= 0
    )


def _probability(text: str) -> float:
    return _number(text, float, "above 0 and at most 1", lambda value: 0 < value <= 1)


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


def _endpoint(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


if __name__ == "__main__":
    sys.exit(main())
