"""Peak host memory of one task above the interpreter with its imports: [torchrun] memory.py OUT setup|main FLAGS...

Anonymous memory, sampled by a thread; clean pages of mapped files do not count. Each rank writes OUT.<rank>:
{"peak_bytes", "state_bytes"}.
"""

import json
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import llama3.data  # noqa: E402, F401
import llama3.export  # noqa: E402, F401
import llama3.model  # noqa: E402, F401
import train  # noqa: E402
import trainer.trainer  # noqa: E402, F401
from trainer import parallel, setup  # noqa: E402


class Peak:
    """The peak of this process's anonymous memory since `start`, in bytes."""

    def __init__(self):
        self.before = self.peak = self.now()
        threading.Thread(target=self.watch, daemon=True).start()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("RssAnon:")).split()[1]) * 1024

    def watch(self) -> None:
        while not threading.Event().wait(0.001):
            self.peak = max(self.peak, self.now())

    def above_start(self) -> int:
        return max(self.peak, self.now()) - self.before


out, task, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
if task == "setup":  # a run up to its first step: weights, optimizer, what is resumed
    job = train.build_trainer(train.parse_args(flags))
    with setup.process_group(job.device):
        peak = Peak()
        job.build()
        job.prepare_training()
        measured = peak.above_start()
        tensors = [parallel.local(tensor) for tensor in job.saved_tensors().values()]
        state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
else:
    peak = Peak()
    assert train.main(flags) == 0
    measured, state = peak.above_start(), 0
result = {"peak_bytes": measured, "state_bytes": state}
Path(f"{out}.{os.environ.get('RANK', 0)}").write_text(json.dumps(result))
