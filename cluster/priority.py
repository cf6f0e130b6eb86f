"""How much of a contended processor a process gets: a tenth while it starts, then its share.

A new process takes a core for seconds, most of it before a line of ours has run, and those who
serve need that core for each token. So Ray is told to start its workers low, where they may rise
again; where they may not, they start as high as the others and only what loads stays low.
"""

import contextlib
import os
import resource
import threading
from pathlib import Path

# The lowest of a contended core's shares that still is one: about a tenth.
START_NICENESS = 10
SERVE_NICENESS = 0
# Its number among Linux' capabilities.
CAP_SYS_NICE = 23


def start_niceness() -> int:
    """Of a new process of ours."""
    return START_NICENESS if _may_rise() else SERVE_NICENESS


def serve_first() -> None:
    """This process serves, or is waited for: it gets its share. Each thread has its own niceness
    on Linux. Where that is not allowed everything stays as it is."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(PermissionError, ProcessLookupError):
            if os.getpriority(os.PRIO_PROCESS, int(task)) > SERVE_NICENESS:
                os.setpriority(os.PRIO_PROCESS, int(task), SERVE_NICENESS)


def let_others_go_first() -> None:
    """This thread, for good."""
    thread = threading.get_native_id()
    niceness = max(os.getpriority(os.PRIO_PROCESS, thread), START_NICENESS)
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _may_rise() -> bool:
    most, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if most == resource.RLIM_INFINITY or most >= 20 - SERVE_NICENESS:
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> CAP_SYS_NICE & 1)
    return False
