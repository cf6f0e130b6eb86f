"""`model1 demo`: a whole deployment on this machine, one real prompt through it, nothing left."""

import asyncio
import os
import time
from collections.abc import Iterable
from pathlib import Path

from cluster.access import access
from cluster.client import Client, End, Question, connected
from cluster.config import Settings
from cluster.deployment import Site, deployed, prepared
from cluster.members import DeploymentError
from cluster.serve import cancel_on_signals
from cluster.status import member_table

PROMPT = "Once upon a time,"
MAX_TOKENS = 96
# Ray kills its workers a moment after it says that it has.
PROCESS_END_TIMEOUT_SECONDS = 10.0


def demo(settings: Settings, prompt: str) -> None:
    started = time.monotonic()
    print("starting Ray ...", flush=True)
    with prepared(settings) as site:
        pids = asyncio.run(_demo(site, prompt))
    _wait_until_gone(pids)
    seconds = time.monotonic() - started
    print(f"\nall {len(pids)} processes have ended; {seconds:.1f} s in all")


async def _demo(site: Site, prompt: str) -> tuple[int, ...]:
    cancel_on_signals()
    print("starting the actors ...", flush=True)
    async with deployed(site) as deployment:
        print(f"gRPC at {deployment.endpoint}\n", flush=True)
        async with connected(access(site.settings, deployment.endpoint)) as client:
            await _converse(client, prompt)
            topology = await client.topology()
        print(member_table(topology.members))
    return tuple(member.pid for member in topology.members)


async def _converse(client: Client, prompt: str) -> None:
    print(f"> {prompt}", end="", flush=True)
    sent = time.monotonic()
    first = last = sent
    num_tokens = 0
    async for frame in client.ask(Question(prompt=prompt, max_tokens=MAX_TOKENS)):
        if isinstance(frame, End):
            continue
        last = time.monotonic()
        first = last if num_tokens == 0 else first
        num_tokens += len(frame.token_ids)
        print(frame.text, end="", flush=True)
    decoded = max(0, num_tokens - 1) / (last - first) if last > first else 0.0
    print(
        f"\n\n{num_tokens} tokens; the first after {first - sent:.2f} s, "
        f"then {decoded:.1f} tokens/s\n"
    )


def _wait_until_gone(pids: Iterable[int]) -> None:
    left = set(pids)
    deadline = time.monotonic() + PROCESS_END_TIMEOUT_SECONDS
    while left := {pid for pid in left if _is_alive(pid)}:
        if time.monotonic() > deadline:
            raise DeploymentError(f"processes {sorted(left)} are still running")
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # somebody else's by now, and so not ours
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # gone in between, or a system without /proc
    # A container's first process often waits for nobody: what has ended stays there as a zombie.
    return stat.rpartition(")")[2].split()[0] != "Z"
