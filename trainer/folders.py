"""A run's folders: one run at a time writes to them, and what it would replace is set aside."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, CheckpointError, CheckpointName

logger = logging.getLogger(__name__)

LOCK = ".run.lock"  # marks a folder of this program; the run that writes there holds its lock
IGNORED = {"lost+found", ".gitignore", ".gitkeep"}
FLAGS_FILE = "config.yaml"  # beside metrics and checkpoints: the run's flags
LINKS = ("last", "best", ".good")  # .good: the newest checkpoint from which a step succeeded
OTHERS = "name another --save_dir and --log_dir"


@contextlib.contextmanager
def claimed(folders: list[Path], inputs: list[Path], fresh: bool) -> Iterator[str]:
    """Makes the folders that are missing, and holds all of them for this run; ValueError if it cannot.

    The kernel frees the locks when the process ends. inputs: paths that a fresh run must not set aside.
    Yields what the lock of the first folder says.
    """
    for folder in folders:
        if not _is_ours(folder):
            raise ValueError(f"{folder} holds files that no run wrote: {OTHERS}, or an empty folder")
        for path in inputs if fresh and _holds_a_run(folder) else []:
            if path.exists() and folder.resolve() in path.resolve().parents:
                raise ValueError(f"{folder} holds another run and would be set aside, with {path}: {OTHERS}")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_lock(folder)) for folder in folders][0]


def _is_ours(folder: Path) -> bool:
    """Did a run make the folder, or is there nothing in it yet?"""
    names = set(os.listdir(folder)) - IGNORED if os.path.isdir(folder) else set()
    return not names or LOCK in names or _holds_a_run(folder)


def _holds_a_run(folder: Path) -> bool:
    marks = ("last/manifest.json", "last/0.ckpt", "metrics.jsonl")  # the second is of nnScaler's shards
    return any(os.path.exists(folder / mark) for mark in marks) or bool(checkpoint.checkpoints(folder))


def check_shared(folder: Path, lock: str) -> None:
    """Raises ValueError if this rank sees no such lock. Not for rank 0, which would free the lock."""
    if not (folder / LOCK).exists() or (folder / LOCK).read_text() != lock:
        what = f"{folder} on {os.uname().nodename} is not the folder of rank 0"
        raise ValueError(f"{what}: name a --save_dir that all nodes share")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): {OTHERS}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child inherits it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                what = f"a run that is still going ({file.read() or 'it is starting'}) writes to {folder}"
                raise ValueError(f"{what}: wait for it, stop it, or {OTHERS}") from None
            logger.warning("WARNING: %s cannot be locked (%s): start no second run there", folder, error)
        file.truncate(0)
        file.write(text := f"process {os.getpid()} on {os.uname().nodename} since {time.time():.3f}")
        file.flush()
        os.fsync(file.fileno())
        yield text


def contents(folder: Path) -> list[Path]:
    """What a run wrote to the folder, without other folders of the same run, which have their own locks."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.name not in IGNORED | {LOCK} and not any(path.rglob(LOCK))]


def set_aside(folder: Path, paths: list[Path], what: str = "another run") -> None:
    """Moves the paths, which lie in the folder, to a new numbered folder beside it.

    Raises CheckpointError if the folder holds another run and is a mount point.
    """
    folder = folder.resolve()
    if folder.is_mount() and what == "another run":
        where = "is a mount point, beside which nothing can be set aside"
        raise CheckpointError(f"{folder} holds another run, and {where}: {OTHERS}")
    place = folder / "aside" if folder.is_mount() else folder
    numbered = (place.with_name(f"{place.name}.{number}") for number in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    target.mkdir()
    for path in paths:
        os.rename(path, target / path.name)
    logger.warning("%s holds %s: set aside in %s", folder, what, target)


def survey(save_dir: Path, resumed: Checkpoint | None) -> tuple[Path | None, list[Path]]:
    """The resumed checkpoint's folder in save_dir, or None, and what the run would replace there.

    A fresh run replaces all of another one; a resumed one the checkpoints that the resumed one does not
    descend from, and folders in the place of links.
    """
    if not resumed:
        return None, contents(save_dir) if _holds_a_run(save_dir) else []
    path, state = resumed.path, resumed.state
    home = save_dir.resolve() / str(CheckpointName(state["epoch"], state["step"]))
    if path.is_dir() and path.parent == home.parent and not home.exists():
        os.rename(path, home)  # a folder called `last`, where the links were not copied
    links = [save_dir / link for link in LINKS]
    found = [path for path in links if path.is_dir() and not path.is_symlink()]
    found += [path for path in checkpoint.checkpoints(save_dir) if not _descends(state, path)]
    known = home.exists() and home not in [path.resolve() for path in found]
    validations = [checkpoint.validation_path(path) for path in found]
    beside = [*validations, *([save_dir / FLAGS_FILE] if found else [])]
    return home if known else None, found + [path for path in beside if path.exists()]


def make_room(save_dir: Path, home: Path | None, replaced: list[Path]) -> None:
    """Sets aside what `survey` found, and removes what a kill left behind."""
    for kind in ("saving", "doomed"):
        for path in save_dir.glob(f".{kind}-[0-9]*-[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)
    if replaced:
        what = "checkpoints that this run does not continue" if home else "another run"
        set_aside(save_dir, replaced, what)
    if home:
        good = save_dir / ".good"
        if good.is_symlink() and checkpoint.step_of(good.readlink()) >= checkpoint.step_of(home):
            swap_link(save_dir, ".good", home.name)  # what descended from it proved it
        swap_link(save_dir, "last", home.name)
    for path in (save_dir / link for link in LINKS):
        if path.is_symlink() and not path.exists():
            path.unlink()


def _descends(state: dict, path: Path) -> bool:
    try:
        return checkpoint.descends_from(state, checkpoint.read_manifest(path)["state"])
    except CheckpointError:
        return False


def swap_link(save_dir: Path, link: str, target: str) -> None:
    """Lets the link name another checkpoint, in one step."""
    temporary = save_dir / f".{link}.new"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, save_dir / link)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, which is renamed first: half of one must not look like a checkpoint."""
    doomed = checkpoint.hidden_path(folder, "doomed")
    try:
        checkpoint.validation_path(folder).unlink(missing_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning("WARNING: the old checkpoint %s cannot be removed: %s", folder, error)
