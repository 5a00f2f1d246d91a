"""Trains, kills, resumes, and compares with an undisturbed run bit for bit, with the user's flags."""

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from errors import TrainingFailed, UserError
from tools.curves import read_metrics
from tools.doctor import GIB
from trainer import machine
from trainer.ending import end_with_parent

logger = logging.getLogger(__name__)

COMPARED = ("epoch", "train_loss", "lr", "gnorm", "tokens", "val_loss", "perplexity")
# Flags of train.py that this tool sets itself.
REPLACED = {
    "verify_resume",
    "save_dir",
    "log_dir",
    "max_train_steps",
    "max_epochs",
    "save_every_n_train_steps",
}
REPLACED |= {"deterministic", "report_to", "world_size"}
LEAST_STEPS = 4
DEFAULT_STEPS = 20
ATTEMPTS = 5  # to kill a run before it ends
CPU_RANKS = 2
PROCESS_GIB = 0.6  # of a rank on a CPU, beside the model's state: Python, torch and gloo
MARKER = ".verify_resume"  # lies in a folder that this tool made, and may empty and remove
LOCK = ".lock"  # of the verification that uses the folder now
WHOLE = "whole"
KILLED = "killed"
OUTPUT = "output.txt"


# ---------------------------------------------------------------- the machine


def cuda_ranks(world_size: int | None, devices: int) -> int:
    """Return a rank for each device, or as many as asked for; raise UserError if there are fewer devices."""
    if world_size is None:
        return devices
    if world_size > devices:
        raise UserError(
            f"--verify_resume needs a CUDA device for each rank, and --world_size={world_size} is more than "
            f"the {devices} of this machine",
            f"Give --world_size={devices} or less",
        )
    return world_size


def cpu_ranks(world_size: int | None, state_gib: float) -> int:
    """Return how many ranks a CPU trains on: two, fewer where two do not fit, or as many as asked for.

    state_gib: weights, gradients and AdamW's moments of all ranks together. Raise UserError if memory cannot
    hold the ranks.
    """
    free_gib = machine.memory().free / GIB
    most = max(0, int((free_gib - state_gib) / PROCESS_GIB))
    if most == 0:
        raise UserError(
            f"--verify_resume needs {state_gib + PROCESS_GIB:.1f} GiB of memory for the model's state and a "
            f"process, and {free_gib:.1f} GiB are free",
            "Stop other programs, or give a smaller model",
        )
    if world_size is None:
        return min(CPU_RANKS, machine.worker_processes(), most)
    if world_size > most:
        raise UserError(
            f"--verify_resume needs {state_gib + world_size * PROCESS_GIB:.1f} GiB of memory for the model's "
            f"state and {world_size} processes, and {free_gib:.1f} GiB are free",
            f"Give --world_size={most} or less, stop other programs, or give a smaller model",
        )
    return world_size


# ---------------------------------------------------------------- the folder


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, or empty the one that an earlier verification left, and hold it for this one.

    Raise UserError, and touch nothing, if anything else is there or another verification runs in it.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("train.py --verify_resume made this folder. It empties and removes it.\n")
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another --verify_resume is running in {folder}", "Wait for it, or give another --save_dir"
        ) from None
    with lock:
        _empty(folder)
        yield


def _check_folder(folder: Path) -> None:
    """Raise UserError if the folder is there, is not empty, and no verification made it."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(
            f"--verify_resume needs the folder {folder} for its runs, and a file has that name",
            "Move the file, or give another --save_dir",
        )
    names = os.listdir(folder)
    if names and MARKER not in names:
        raise UserError(
            f"--verify_resume needs the folder {folder} for its runs, and it holds other files",
            "Move that folder, or give another --save_dir",
        )


def _empty(folder: Path) -> None:
    """Remove what a verification wrote."""
    for run in (WHOLE, KILLED):
        if (folder / run).exists():
            shutil.rmtree(folder / run)
    (folder / OUTPUT).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove the folder with what a verification wrote; it stays if something else is in it."""
    _empty(folder)
    (folder / LOCK).unlink(missing_ok=True)
    (folder / MARKER).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


# ---------------------------------------------------------------- the runs


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Starts runs of train.py under torchrun, each in a folder of its own below `folder`."""

    script: Path
    flags: list[str]
    folder: Path
    ranks: int

    def start(self, name: str, *more: str) -> subprocess.Popen:
        """Start a run, which ends when this process ends, even by SIGKILL."""
        parent = os.getpid()

        def end_with_this_process() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no handler of this process
            end_with_parent()
            if os.getppid() != parent:  # it ended before the kernel was asked
                os._exit(1)

        run = self.folder / name
        run.mkdir(exist_ok=True)
        launcher = [*machine.ONE_MACHINE, f"--nproc_per_node={self.ranks}"]
        places = [f"--save_dir={run / 'checkpoints'}", f"--log_dir={run / 'log'}"]
        command = [sys.executable, *launcher, str(self.script), *self.flags, *places, *more]
        with open(self.folder / OUTPUT, "a") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_this_process,
            )

    def tail(self) -> str:
        """Return what the last run said of its end."""
        output = (self.folder / OUTPUT).read_text()
        sentences = [line for line in output.splitlines() if line.startswith("train.py:")]
        if sentences:
            return "\n".join(sentences[-3:])
        return output[-1500:]


def verify(script: Path, flags: dict, folder: Path, ranks: int, steps: int) -> str | None:
    """Return the first difference between a killed, resumed run and an undisturbed one; None if equal.

    flags: train.py's explicit ones. folder: what `claimed` accepts; it is removed if the runs are equal.
    Raise UserError for what the user can mend, TrainingFailed if the undisturbed run fails.
    """
    save_every = max(1, steps // LEAST_STEPS)
    words = []
    for name, value in flags.items():
        if name in REPLACED or value is False:
            continue
        word = f"--{name}"
        if value is not True:
            word = f"--{name}={value}"
        words.append(word)
    words += [f"--max_train_steps={steps}", f"--save_every_n_train_steps={save_every}"]
    words += ["--deterministic", "--report_to=none"]
    runs = Runs(script=script, flags=words, folder=folder, ranks=ranks)
    with claimed(folder):
        difference = _kill_resume_and_compare(runs, steps, save_every)
        if difference is None:
            _remove(folder)
    return difference


def _kill_resume_and_compare(runs: Runs, steps: int, save_every: int) -> str | None:
    logger.info("1 of 3: %d steps undisturbed on %d ranks", steps, runs.ranks)
    if _finish(runs.start(WHOLE)):
        raise TrainingFailed(f"the undisturbed run failed; {runs.folder / OUTPUT} ends with:\n{runs.tail()}")
    _kill_one(runs, steps, save_every)
    logger.info("3 of 3: resumed from the last checkpoint")
    if _finish(runs.start(KILLED, "--resume_from=last")):
        return f"the resumed run failed; {runs.folder / OUTPUT} ends with:\n{runs.tail()}"
    return first_difference(runs.folder / WHOLE, runs.folder / KILLED)


def _kill_one(runs: Runs, steps: int, save_every: int) -> None:
    """Start a run and kill it after a save; again if it ends before the kill, as a fast one may."""
    run = runs.folder / KILLED
    last_save = min(3, (steps - 1) // save_every)
    for _ in range(ATTEMPTS):
        step = random.randint(1, last_save) * save_every
        logger.info("2 of 3: the same, killed about the time when step %d is saved", step)
        if run.exists():
            shutil.rmtree(run)
        if _kill_after(runs.start(KILLED), run, step):
            return
    raise UserError(
        f"--verify_resume needs a run that it can kill, and all {steps} steps are over before it does",
        "Give more --max_train_steps",
    )


def _finish(process: subprocess.Popen) -> int:
    """Return the exit code; an exception here ends the run too."""
    try:
        return process.wait()
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to torchrun and its ranks, which it starts in sessions of their own."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
    process.wait()


def _kill_after(process: subprocess.Popen, run: Path, step: int) -> bool:
    """Kill the run up to 0.2 s after it has logged the step and saved one; False: it ended before."""
    log_dir = run / "log"
    last = run / "checkpoints" / "last"
    try:
        while process.poll() is None:
            if last.exists() and any(row["step"] >= step for row in read_metrics(log_dir)):
                time.sleep(random.uniform(0, 0.2))
                break
            time.sleep(0.001)
        return process.poll() is None
    finally:
        _kill(process)


# ---------------------------------------------------------------- the comparison


def first_difference(whole: Path, resumed: Path) -> str | None:
    """Compare the metrics step by step, then the tensors of the last checkpoint."""
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
