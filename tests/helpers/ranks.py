"""Started by torchrun once for many cases: every rank calls train.py's main with each case's command line in turn."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # noqa: E402

cases, codes = json.loads(Path(sys.argv[1]).read_text()), {}
dist.init_process_group("gloo")
alone = {"WORLD_SIZE": "1", "RANK": "0"}
for name, argv in cases.items():
    if any(
        flag.startswith(("--merge_checkpoint", "--export_hf")) for flag in argv
    ):  # one process; the others wait for it
        before = {key: os.environ[key] for key in alone}
        if dist.get_rank() == 0:
            os.environ.update(alone)
            codes[name] = train.main(argv)
            os.environ.update(before)
    else:
        with contextlib.suppress(SystemExit):
            codes[name] = train.main(argv)
    dist.barrier()
if dist.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(codes))
dist.destroy_process_group()
