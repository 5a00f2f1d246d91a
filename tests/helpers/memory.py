"""Peak host memory of one task, above the interpreter with its imports: [torchrun] memory.py OUT setup|main FLAGS...

Resident memory, mapped pages included, as the kernel counts it. Each rank writes OUT.<rank>: {"peak_bytes", "state_bytes"}.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import llama3.data  # noqa: E402, F401
import llama3.export  # noqa: E402, F401
import llama3.model  # noqa: E402, F401
import train  # noqa: E402
import trainer.trainer  # noqa: E402, F401


def status(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")
    )
    return int(line.split()[1]) * 1024


out, task, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
if task == "setup":  # a run up to its first step: weights, optimizer, what is resumed
    job = train.build_trainer(train.parse_args(flags))
    with job._process_group():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        job._setup()
        job._set_up_training()
        peak = status("VmHWM") - before
        local = [p.to_local() for p in job.names]
        moments = [v.to_local() for s in job.optimizer.state.values() for k, v in s.items() if k != "step"]
        state = sum(t.numel() * t.element_size() for t in local + moments)
else:
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    assert train.main(flags) == 0
    peak, state = status("VmHWM") - before, 0
Path(f"{out}.{os.environ.get('RANK', 0)}").write_text(json.dumps({"peak_bytes": peak, "state_bytes": state}))
