"""Ends a rank: with its torchrun, or with an error, printed and recorded for torchrun and train.sbatch."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
CATEGORIES = {1: "failed run", 2: "wrong input"}  # of exit codes


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM to this process when the one that started it ends, even by SIGKILL."""
    import ctypes  # here, because `python train.py --help` does not need it

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_torchrun() -> None:
    """Let a rank of a killed torchrun save and leave: else it trains on beside whoever resumes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def complain(message: str, code: int, curable: bool = False) -> int:
    """Print and record the message, and return the exit code.

    A node's first rank prints at once; the others wait 20 s for torchrun to stop them, then print too.
    curable: a restart may help.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(20)
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    record(f"train.py: {message}", CATEGORIES[code], curable)
    return code


def record(message: str, category: str, curable: bool) -> None:
    """Tell torchrun, whose summary shows the message, and tools/train.sbatch why this rank ends.

    category: 'wrong input', 'failed run' or 'bug'.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        traits = {"category": category, "retryability": str(curable)}
        with contextlib.suppress(OSError):  # the disk may be full, and half a file would break torchrun
            Path(f"{file}.new").write_text(json.dumps({"message": details, "errorTraits": traits}))
            os.replace(f"{file}.new", file)
