"""`model1 serve`: a deployment in the foreground until it is told to stop or cannot go on."""

import asyncio
import signal
import sys
from contextlib import redirect_stdout
from types import FrameType
from typing import NoReturn, TextIO

from cluster.config import Settings
from cluster.deployment import Site, deployed, prepared
from cluster.members import DeploymentError


def serve(settings: Settings) -> None:
    """Returns after a drain on SIGTERM or SIGINT; a second signal cuts the drain short."""
    stdout = sys.stdout
    signal.signal(signal.SIGTERM, _exit)
    try:
        # Ray reports the death of a worker on stdout, which is for the one line scripts wait for.
        with redirect_stdout(sys.stderr), prepared(settings) as site:
            asyncio.run(_serve(site, stdout))
    except (SystemExit, KeyboardInterrupt):
        return  # asked to stop while Ray was starting


async def _serve(site: Site, stdout: TextIO) -> None:
    cancel_on_signals()
    try:
        async with deployed(site) as deployment:
            print(f"ready grpc={deployment.endpoint}", file=stdout, flush=True)
            why = await deployment.supervisor.watch()
            raise DeploymentError(f"the deployment cannot serve any more: {why}")
    except asyncio.CancelledError:
        return  # asked to stop, and drained


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    # What Ray's own handler does, which takes over during its start.
    sys.exit(number)


def cancel_on_signals() -> None:
    """SIGTERM and SIGINT cancel the running task, and so unwind whatever it holds."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
