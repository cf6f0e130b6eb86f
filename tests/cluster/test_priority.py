"""Who starts yields to who serves, and who serves gets its share."""

import os
import subprocess
import sys
from pathlib import Path

from cluster.priority import START_NICENESS, start_niceness

ROOT = Path(__file__).parents[2]

PROCESS = """
import os, threading
from cluster.priority import START_NICENESS, let_others_go_first, serve_first, start_niceness

def nicenesses():
    return {os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir("/proc/self/task")}

os.nice(start_niceness())
low, high = threading.Event(), threading.Event()

def other():
    low.set()
    high.wait()

thread = threading.Thread(target=other)
thread.start()
low.wait()
print(*nicenesses())
serve_first()
print(*nicenesses())
let_others_go_first()
print(*sorted(nicenesses()))
high.set()
"""


def test_every_thread_rises_where_it_may_and_the_one_that_loads_stays_low() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    own = os.getpriority(os.PRIO_PROCESS, 0)
    before, serving, loading = done.stdout.splitlines()
    assert before == str(min(own + start_niceness(), 19))
    if start_niceness():
        assert serving == "0"
        assert loading == f"0 {START_NICENESS}"
    else:
        assert serving == str(own)
