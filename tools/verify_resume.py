"""Trains, kills, resumes, and compares with an undisturbed run bit for bit, with the user's flags."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.curves import read_metrics

logger = logging.getLogger(__name__)

COMPARED = ("epoch", "train_loss", "lr", "gnorm", "tokens", "val_loss", "perplexity")
# Flags of train.py that this tool sets itself.
OWN = {"verify_resume", "save_dir", "log_dir", "max_train_steps", "save_every_n_train_steps"}
OWN |= {"deterministic", "report_to", "world_size"}


def verify(script: Path, given: dict, folder: Path, ranks: int, steps: int) -> str | None:
    """Returns the first difference between a killed, resumed run and an undisturbed one; None if equal.

    given: train.py's explicit flags. folder: emptied first, and removed if the runs are equal. Raises
    ValueError if a run cannot be started or killed.
    """
    if steps < 4:
        raise ValueError(f"--verify_resume with --max_train_steps={steps}: a kill needs at least 4 steps")
    shutil.rmtree(folder, ignore_errors=True)
    every = max(1, steps // 4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    kept = {name: value for name, value in given.items() if name not in OWN and value is not False}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in kept.items()]
    flags += [f"--max_train_steps={steps}", f"--save_every_n_train_steps={every}", "--deterministic"]
    flags += ["--report_to=none"]

    def start(run: str, *more: str) -> subprocess.Popen:
        folders = [f"--save_dir={folder / run / 'checkpoints'}", f"--log_dir={folder / run / 'log'}"]
        (folder / run).mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a") as output:
            command = [*launcher, str(script), *flags, *folders, *more]
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    logger.info("1 of 3: %d steps undisturbed on %d ranks", steps, ranks)
    if _finish(start("whole")):
        raise ValueError(f"the undisturbed run failed; {folder / 'output.txt'} ends with:\n{_tail(folder)}")
    for _ in range(5):  # a fast run may end before the kill: try again
        step = random.randint(1, min(3, (steps - 1) // every)) * every  # this step is saved
        logger.info("2 of 3: the same, killed about the time when step %d is saved", step)
        shutil.rmtree(folder / "killed", ignore_errors=True)
        if _kill_after(start("killed"), folder / "killed", step):
            break
    else:
        raise ValueError("the run ends too soon to be killed: give more --max_train_steps")
    logger.info("3 of 3: resumed from the last checkpoint")
    if _finish(start("killed", "--resume_from=last")):
        return f"the resumed run failed; {folder / 'output.txt'} ends with:\n{_tail(folder)}"
    difference = first_difference(folder / "whole", folder / "killed")
    if difference is None:
        shutil.rmtree(folder)
    return difference


def _tail(folder: Path) -> str:
    output = (folder / "output.txt").read_text()
    lines = [line for line in output.splitlines() if line.startswith("train.py:")]
    return "\n".join(lines[-3:]) or output[-1500:]


def _finish(process: subprocess.Popen) -> int:
    """Returns the exit code; an exception here ends the run too."""
    try:
        return process.wait()
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and its ranks, which it starts in sessions of their own."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [*map(int, children), process.pid]:
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _kill_after(process: subprocess.Popen, run: Path, step: int) -> bool:
    """Kills the run up to 0.2 s after it has logged the step and saved one; False: it ended before."""
    log_dir, last = run / "log", run / "checkpoints" / "last"
    try:
        while process.poll() is None:
            rows = read_metrics(log_dir) if (log_dir / "metrics.jsonl").exists() else []
            if any(row["step"] >= step for row in rows) and last.exists():
                time.sleep(random.uniform(0, 0.2))
                break
            time.sleep(0.001)
        return process.poll() is None
    finally:
        _kill(process)


def first_difference(whole: Path, resumed: Path) -> str | None:
    """Compares the metrics step by step, then the tensors of the last checkpoint."""
    import torch

    from trainer.checkpoint import Checkpoint

    def steps(run: Path) -> dict[tuple, dict]:
        rows = [row for row in read_metrics(run / "log") if "save_total_seconds" not in row]
        return {(row["step"], "val_loss" in row): row for row in rows}

    one, other = steps(whole), steps(resumed)
    for key in sorted(one.keys() | other.keys()):
        for name in COMPARED:
            first, second = one.get(key, {}).get(name), other.get(key, {}).get(name)
            if first != second:
                return f"step {key[0]}: {name} is {first!r} undisturbed, {second!r} after the resume"
    first, second = (Checkpoint.open(run / "checkpoints" / "last") for run in (whole, resumed))
    for name in first.tensors:
        if not torch.equal(first.read(name), second.read(name)):
            return f"the last checkpoints differ, first in {name}"
    return None
