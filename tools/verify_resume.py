"""Trains, kills, resumes, and compares with an undisturbed run bit for bit: on this machine, with these flags."""

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
OWN = (
    "verify_resume",
    "save_dir",
    "log_dir",
    "max_train_steps",
    "save_every_n_train_steps",
    "deterministic",
    "world_size",
)


def verify(script: Path, given: dict, folder: Path, ranks: int, steps: int) -> str | None:
    """Returns the first difference between a killed, resumed run and an undisturbed one; None if they are equal.

    given: train.py's explicit flags. folder: emptied first, and removed if the runs are equal. Raises ValueError if
    a run cannot be started or killed.
    """
    if steps < 4:
        raise ValueError(f"--verify_resume with --max_train_steps={steps}: a kill needs at least 4 steps")
    shutil.rmtree(folder, ignore_errors=True)
    every = max(1, steps // 4)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        str(script),
    ]
    flags = [f"--{k}" if value is True else f"--{k}={value}" for k, value in given.items() if k not in OWN]
    flags += [f"--max_train_steps={steps}", f"--save_every_n_train_steps={every}", "--deterministic"]

    def command(run: str, *more: str) -> list[str]:
        folders = [f"--save_dir={folder / run / 'checkpoints'}", f"--log_dir={folder / run / 'log'}"]
        return [*launcher, *flags, *folders, *more]

    logger.info("1 of 3: %d steps undisturbed on %d ranks", steps, ranks)
    if _run(command("whole"), folder):
        raise ValueError(f"the undisturbed run failed; {folder / 'output.txt'} ends with:\n{_tail(folder)}")
    for _ in range(5):  # a fast run may end before the kill: try again
        during_save, step = random.random() < 0.5, random.randint(1, min(3, (steps - 1) // every)) * every
        logger.info(
            "2 of 3: the same, killed %s step %d", "while saving" if during_save else "some time after", step
        )
        shutil.rmtree(folder / "killed", ignore_errors=True)
        if _kill_at(_start(command("killed"), folder), folder / "killed", step, during_save):
            break
    else:
        raise ValueError("the run ends too soon to be killed: give more --max_train_steps")
    logger.info("3 of 3: resumed from the last checkpoint")
    if _run(command("killed", "--resume_from=last"), folder):
        return f"the resumed run failed; {folder / 'output.txt'} ends with:\n{_tail(folder)}"
    difference = first_difference(folder / "whole", folder / "killed")
    if difference is None:
        shutil.rmtree(folder)
    return difference


def _tail(folder: Path) -> str:
    output = (folder / "output.txt").read_text()
    return (
        "\n".join([line for line in output.splitlines() if line.startswith("train.py:")][-3:])
        or output[-1500:]
    )


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _run(command: list[str], folder: Path) -> int:
    """Returns the exit code; an exception here ends the run too."""
    process = _start(command, folder)
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


def _kill_at(process: subprocess.Popen, run: Path, step: int, during_save: bool) -> bool:
    """Kills the run once it has logged the step, and begun to save it if `during_save`; False: it ended before."""
    saved = f"{step:04d}"
    try:
        while process.poll() is None:
            logged = (run / "log" / "metrics.jsonl").exists() and any(
                row["step"] >= step for row in read_metrics(run / "log")
            )
            if logged and (not during_save or any((run / "checkpoints").glob(f"*{saved}"))):
                time.sleep(random.uniform(0, 0.05 if during_save else 0.5))
                break
            time.sleep(0.001)
        return process.poll() is None
    finally:
        _kill(process)


def first_difference(whole: Path, resumed: Path) -> str | None:
    """Compares the metrics step by step, then the tensors of the last checkpoint."""
    import torch

    from trainer.checkpoint import Checkpoint

    one, other = (
        {
            (row["step"], "val_loss" in row): row
            for row in read_metrics(run / "log")
            if "save_total_seconds" not in row
        }
        for run in (whole, resumed)
    )
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
