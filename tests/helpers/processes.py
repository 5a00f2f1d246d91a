"""Watches processes that a test started, and what these started."""

import contextlib
import os
import signal
import time
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    found = []
    with contextlib.suppress(OSError):  # it may end meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    """Return whether the process runs. One that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for_end(pids: list[int], seconds: float) -> None:
    """Fail if a process is still alive after that time."""
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline") for pid in pids if is_alive(pid)]
        time.sleep(0.05)


def kill_all(pids: list[int]) -> None:
    """Kill those that are alive."""
    for pid in filter(is_alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
