"""What `model1 demo` takes for ended."""

import os
import subprocess
import sys

from cluster.demo import _is_alive


def test_a_process_that_nobody_waits_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    assert _is_alive(child.pid)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not _is_alive(child.pid)
    child.wait()
    assert not _is_alive(child.pid)
