"""Proves on this machine, with this model and these flags, that a killed and resumed run equals an undisturbed one, bit for bit."""

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


def verify(script: Path, flags: list[str], folder: Path, ranks: int, steps: int) -> str | None:
    """Trains `steps` steps at once; trains again, is killed at a random moment, resumes; returns the first difference, None if equal.

    `folder` is this tool's alone: it is emptied, and removed when nothing differs.
    """
    shutil.rmtree(folder, ignore_errors=True)
    every = max(1, steps // 4)
    fixed = [f"--max_train_steps={steps}", f"--save_every_n_train_steps={every}", "--deterministic"]

    def command(run: str, *more: str) -> list[str]:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            str(script),
        ]
        return [
            *launcher,
            *flags,
            *fixed,
            f"--save_dir={folder / run / 'checkpoints'}",
            f"--log_dir={folder / run / 'log'}",
            *more,
        ]

    logger.info("1 of 3: %d steps undisturbed on %d ranks", steps, ranks)
    if _run(command("whole"), folder):
        raise ValueError(
            f"the undisturbed run failed by itself; the end of {folder / 'output.txt'} says:\n{_tail(folder)}"
        )
    for _ in range(5):  # a fast run may be over before it is killed: then again
        # The moment: while a save is under way, or some time after a step.
        during_save, step = random.random() < 0.5, random.randint(1, min(3, (steps - 1) // every)) * every
        logger.info(
            "2 of 3: the same, killed %s step %d", "while saving" if during_save else "some time after", step
        )
        shutil.rmtree(folder / "killed", ignore_errors=True)
        if _kill_at(_start(command("killed"), folder), folder / "killed", step, during_save):
            break
    else:
        raise ValueError("the run is over too soon to be killed: give more --max_train_steps")
    logger.info("3 of 3: resumed from the last checkpoint")
    if _run(command("killed", "--resume_from=last"), folder):
        return f"the resumed run failed; the end of {folder / 'output.txt'} says:\n{_tail(folder)}"
    difference = first_difference(folder / "whole", folder / "killed")
    if difference is None:
        shutil.rmtree(folder)
    return difference


def _tail(folder: Path) -> str:
    said = [line for line in (folder / "output.txt").read_text().splitlines() if line.startswith("train.py:")]
    return "\n".join(said[-3:]) or (folder / "output.txt").read_text()[-1500:]


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _run(command: list[str], folder: Path) -> int:
    """The exit code; whoever stops this stops the run."""
    process = _start(command, folder)
    try:
        return process.wait()
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    for pid in [*_children(process.pid), process.pid] if process.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _kill_at(process: subprocess.Popen, run: Path, step: int, during_save: bool) -> bool:
    """SIGKILL to every process of the run, once `step` is logged (and, if so wanted, its save has begun); False: it was over before."""
    try:
        while process.poll() is None:
            logged = (run / "log" / "metrics.jsonl").exists() and any(
                row["step"] >= step for row in read_metrics(run / "log")
            )
            if logged and (
                not during_save or any((run / "checkpoints").glob(".saving-*")) or _saved(run, step)
            ):
                time.sleep(random.uniform(0, 0.05 if during_save else 0.5))
                break
            time.sleep(0.001)
        return process.poll() is None
    finally:
        _kill(process)


def _saved(run: Path, step: int) -> bool:
    return any(path.name.endswith(f"-{step:04d}") for path in (run / "checkpoints").glob("*-*"))


def _children(pid: int) -> list[int]:
    """torchrun puts each rank into a session of its own: they are found by their parent."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def first_difference(whole: Path, resumed: Path) -> str | None:
    """Metrics step by step, then the tensors of the last checkpoint."""
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
            values = one.get(key, {}).get(name), other.get(key, {}).get(name)
            if values[0] != values[1]:
                return f"step {key[0]}: {name} is {values[0]!r} undisturbed, {values[1]!r} after the resume"
    first, second = (Checkpoint.open(run / "checkpoints" / "last") for run in (whole, resumed))
    for name in first.tensors:
        if not torch.equal(first.read(name), second.read(name)):
            return f"the last checkpoints differ, first in {name}"
    return None
