"""Started by torchrun for many cases: each rank calls train.py's main with each case's flags in turn."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

import train
from trainer import ending, ranks

# The other ranks wait 20 s before they complain, as torchrun ends them meanwhile. It does not here.
ending.time = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
cases, codes = json.loads(Path(sys.argv[1]).read_text()), {}
with ranks.process_group():
    for name, flags in cases.items():
        if not any(flag.startswith("--merge_checkpoint") for flag in flags):
            codes[name] = train.main(flags)
        elif dist.get_rank() == 0:  # one process merges; the others wait for it
            with mock.patch.dict(os.environ, WORLD_SIZE="1", RANK="0"):
                codes[name] = train.main(flags)
        dist.barrier()
        torch.compiler.reset()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(codes))
