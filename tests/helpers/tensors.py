"""Peak of the CPU tensors of a training run on each rank: [torchrun] tensors.py OUT FLAGS...

torch's profiler reports each allocation. Each rank writes its peak above what there was before, in bytes, to
OUT.<rank>.
"""

import os
import sys
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import train

with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
    assert train.main(sys.argv[2:]) == 0
events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
events.sort(key=lambda event: event.start_ns())
peak = max(accumulate(event.nbytes() for event in events))
Path(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}").write_text(str(peak))
