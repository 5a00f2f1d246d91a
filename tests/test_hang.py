"""A rank that hangs, dies or raises ends all ranks soon, with a sentence that names it."""

import os
import signal
import time

import pytest

ENDLESS = ["--max_train_steps=1000000", "--save_every_n_train_steps=1000000"]


@pytest.mark.slow  # torchrun gives a stopped rank 30 s
@pytest.mark.parametrize("sign, said", [(signal.SIGSTOP, "rank 1 ("), (signal.SIGKILL, "Signal 9")])
def test_a_rank_that_hangs_or_dies_ends_all(launch, flags, tmp_path, sign, said):
    run = launch("train.py", *flags, *ENDLESS, "--timeout_seconds=5", ranks=2, real=True)
    run.wait_for_step(3)
    ranks, began = run.ranks(), time.monotonic()
    os.kill(ranks[1], sign)
    output = run.end(code=1)
    assert said in output and time.monotonic() - began < 65
    assert sign == signal.SIGKILL or ("waits in vain in step" in output and "is silent" in output), output
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)
