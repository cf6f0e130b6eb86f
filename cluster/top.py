"""`model1 top`: a deployment in figures, again and again.

Each look is told over the time since the one before. Where the output is a terminal it stays in
place; else the looks follow each other. With a recording, the load goes into a file as well.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from cluster.access import Access
from cluster.client import Client, RequestFailed, Unreachable, connected
from cluster.config import SettingsError
from cluster.figure_tables import autoscale_table, figure_tables
from cluster.figures import Figures, figures
from cluster.kv import tier_states
from cluster.members import MemberState
from cluster.plain import as_plain
from cluster.plan.load_curves import COLUMNS
from cluster.readings import Windows
from protos import control_pb2

HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
CLEAR_ALL = "\x1b[2J"
# In a line; the rest is in `model1 status`.
MAX_NAMES = 4


@dataclass(frozen=True, slots=True)
class Look:
    """What was asked at one moment, and what came of it since the last."""

    endpoint: str
    at: datetime
    server: control_pb2.GetServerInfoResponse
    topology: control_pb2.GetTopologyResponse
    kv: control_pb2.GetKvStatsResponse
    figures: Figures


class LoadRecording:
    """Requests a second of the whole deployment, as `model1 plan autoscale --trace` reads them."""

    def __init__(self, file: TextIO, since: float) -> None:
        self._file = file
        self._start = self._since = since
        self._write(*COLUMNS)

    def measured(self, requests_per_second: float, until: float) -> None:
        """From the last time on. `until` is on the clock that `since` was on."""
        self._write(f"{self._since - self._start:.3f}", f"{requests_per_second:.4f}")
        self._since = until

    def end(self) -> None:
        """A rate holds until the next line."""
        self._write(f"{self._since - self._start:.3f}", "0")

    def _write(self, *cells: str) -> None:
        print(*cells, sep=",", file=self._file, flush=True)


async def top(
    access: Access, *, interval_seconds: float, once: bool, as_json: bool, record: Path | None
) -> None:
    """Until the reader has enough of it; once: a single look, over one interval. Raises
    `Unreachable` if nobody answers at the start; later on it waits for the gateway."""
    is_live = sys.stdout.isatty() and not once and not as_json
    show = show_in_place if is_live else _show_in_turn
    clock = asyncio.get_running_loop().time
    async with connected(access) as client:
        windows = Windows()
        await _look(client, windows)
        with recording(record, clock()) as load:
            if is_live:
                print(CLEAR_ALL, end="")
                show(f"{access.endpoint}: the first figures come in {interval_seconds:g} s")
            while True:
                await asyncio.sleep(interval_seconds)
                try:
                    look = await _look(client, windows)
                except (Unreachable, RequestFailed) as error:
                    if once:
                        raise
                    if is_live:
                        show(str(error))
                    else:
                        print(error, file=sys.stderr, flush=True)
                    continue
                if load is not None:
                    load.measured(look.figures.requests_per_second, clock())
                show(_as_json(look) if as_json else as_text(look))
                if once:
                    return


@contextmanager
def recording(path: Path | None, since: float) -> Iterator[LoadRecording | None]:
    """Raises `SettingsError` where there is a file already, or none can be."""
    if path is None:
        yield None
        return
    try:
        file = path.open("x", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--record {path}: {error.strerror}") from None
    with file:
        recording = LoadRecording(file, since)
        try:
            yield recording
        finally:
            recording.end()


def as_text(look: Look) -> str:
    server, topology = look.server, look.topology
    ready = sum(member.state == MemberState.READY for member in topology.members)
    others = [f"{m.name} {m.state}" for m in topology.members if m.state != MemberState.READY]
    restarted = [f"{m.name} {m.restarts}" for m in topology.members if m.restarts]
    parts = [
        f"{look.at.astimezone():%H:%M:%S}  {look.endpoint} "
        f"{'draining' if server.draining else 'serving'}, up {server.uptime_seconds:.0f} s, "
        f"routing epoch {topology.epoch}\n"
        f"{ready} of {len(topology.members)} processes ready{_some('; ', others)}"
        f"{_some('; started again: ', restarted)}",
        figure_tables(look.figures),
    ]
    if topology.autoscaled:
        parts.append(autoscale_table(topology.autoscaled))
    if look.kv.stores:
        parts.append(tier_states(look.kv.stores))
    return "\n\n".join(parts)


def _some(introduction: str, names: Sequence[str]) -> str:
    """The first of them, if there are any."""
    more = "" if len(names) <= MAX_NAMES else f" and {len(names) - MAX_NAMES} more"
    return introduction + ", ".join(names[:MAX_NAMES]) + more if names else ""


def _as_json(look: Look) -> str:
    return json.dumps(
        {
            "at": look.at.isoformat(),
            "endpoint": look.endpoint,
            "epoch": look.topology.epoch,
            "members": [
                {
                    "name": member.name,
                    "role": member.role,
                    "state": member.state,
                    "pid": member.pid,
                    "restarts": member.restarts,
                }
                for member in look.topology.members
            ],
            **asdict(look.figures),
            "autoscaled": [as_plain(each) for each in look.topology.autoscaled],
            "kv": as_plain(look.kv)["stores"],
        }
    )


async def _look(client: Client, windows: Windows) -> Look:
    server, topology, kv = await asyncio.gather(
        client.server_info(), client.topology(), client.kv_stats()
    )
    now = datetime.now(UTC)
    return Look(client.endpoint, now, server, topology, kv, figures(topology.members, windows))


def _show_in_turn(text: str) -> None:
    print(text, flush=True)


def show_in_place(text: str) -> None:
    """As much of it as the terminal has room for, over what was there before."""
    columns, rows = shutil.get_terminal_size()
    lines = [line[:columns] for line in text.splitlines()[: rows - 1]]
    print(
        HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW, end="", flush=True
    )
