"""How a rank ends with an error: what it prints, and what it leaves for torchrun and tools/train.sbatch."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path


def complain(message: str, code: int, curable: bool = False) -> int:
    """A node's first rank prints; the others wait 20 s for torchrun to stop them, then print too.

    Returns the code. curable: may a restart help?
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(20)
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    record(f"train.py: {message}", curable)
    return code


def record(message: str, curable: bool) -> None:
    """Tells torchrun, whose summary shows the message, and tools/train.sbatch why this rank ends."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        traits = {"category": "train.py", "retryability": str(curable)}
        with contextlib.suppress(OSError):  # the disk may be full, and half a file would break torchrun
            Path(f"{file}.new").write_text(json.dumps({"message": details, "errorTraits": traits}))
            os.replace(f"{file}.new", file)
