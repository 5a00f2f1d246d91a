"""Peak memory of one task above that of the imports: [torchrun] memory.py OUT setup|main FLAGS...

Samples anonymous memory; clean pages of mapped files do not count. Each rank writes OUT.<rank>.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

from helpers.runs import import_all

import train
from cli.config import parse
from trainer import parallel, ranks


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def watch():
    """Samples from now on; returns what gives the peak above now, in bytes."""
    samples = [anonymous_bytes()]

    def sample():
        while True:
            samples.append(anonymous_bytes())
            time.sleep(0.001)

    threading.Thread(target=sample, daemon=True).start()
    return lambda: max(*samples, anonymous_bytes()) - samples[0]


out, task, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
import_all()
if task == "setup":  # a run up to its first step: weights, optimizer, what is resumed
    with ranks.process_group():
        peak = watch()
        job, _ = train.build_trainer(parse(flags))
        job.build()
        job.prepare_training()
        result = {"peak_bytes": peak()}
        tensors = [parallel.local(tensor) for tensor in job.saved_tensors().values()]
        result["state_bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
else:
    peak = watch()
    assert train.main(flags) == 0
    result = {"peak_bytes": peak()}
Path(f"{out}.{os.environ.get('RANK', 0)}").write_text(json.dumps(result))
