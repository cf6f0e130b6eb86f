"""The command line: verbs and flags in, an exit code out.

The verbs themselves are in verbs.py, session_verbs.py and plan_verbs.py. Exit codes: 0 ok,
1 failed, 2 usage, 3 unreachable.
"""

import argparse
import asyncio
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cluster.config import SettingsError
from cluster.plan_verbs import VERBS as PLAN_VERBS
from cluster.session_verbs import VERBS as SESSION_VERBS
from cluster.verbs import VERBS as DEPLOYMENT_VERBS

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE = 0, 1, 2, 3

VERBS = DEPLOYMENT_VERBS | SESSION_VERBS | PLAN_VERBS


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
        VERBS[parsed.verb].run(parsed)
        sys.stdout.flush()  # while a reader that has gone can still be told from a failure
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
    from cluster.chaos.run import Noticed
    from cluster.client import RequestFailed, RequestRefused, Unreachable
    from cluster.kv import KvDamaged
    from cluster.members import DeploymentError
    from cluster.preflight import AddressTaken
    from cluster.ray_session import RayUnavailable
    from cluster.session_file import SessionFileError
    from cluster.topology import TopologyError
    from model1.errors import InvalidRequest, ModelError
    from services.tls import TlsUnusable
    from services.tokens import TokensUnusable

    if isinstance(error, Unreachable):
        return EXIT_UNREACHABLE
    if isinstance(error, TopologyError | InvalidRequest | RequestRefused):
        return EXIT_USAGE
    expected = (
        *(ModelError, DeploymentError, AddressTaken, RayUnavailable, RequestFailed),
        *(ChildFailed, SidesDiffer, KvDamaged, SessionFileError, Noticed),
        *(TlsUnusable, TokensUnusable),
    )
    return EXIT_FAILED if isinstance(error, expected) else None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="model1",
        description="Serve DeepSeek-V4 on Ray. Exit codes: 0 ok, 1 failed, 2 usage, 3 unreachable.",
    )
    version = importlib.metadata.version("model1")
    parser.add_argument("--version", action="version", version=f"model1 {version}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verb.add_arguments(verbs.add_parser(name, help=verb.help, description=verb.help))
    return parser


if __name__ == "__main__":
    sys.exit(main())
