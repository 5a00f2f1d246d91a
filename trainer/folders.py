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

from errors import UserError
from trainer import checkpoint
from trainer.checkpoint import Checkpoint, CheckpointError, CheckpointName

logger = logging.getLogger(__name__)

LOCK = ".run.lock"  # marks a folder of this program; the run that writes there holds its lock
IGNORED = {"lost+found", ".gitignore", ".gitkeep"}
FLAGS_FILE = "config.yaml"  # beside metrics and checkpoints: the run's flags
LINKS = ("last", "best", ".good")  # .good: the newest checkpoint from which a step succeeded
CHOOSE_OTHERS = "Name another --save_dir and --log_dir"


@contextlib.contextmanager
def claimed(folders: list[Path], inputs: list[Path], fresh: bool) -> Iterator[str]:
    """Makes the folders that are missing, and holds all of them for this run; UserError if it cannot.

    The kernel frees the locks when the process ends. inputs: paths that a fresh run must not set aside.
    Yields what the lock of the first folder says.
    """
    for folder in folders:
        if not _is_ours(folder):
            raise UserError(
                f"{folder} is not empty and was not made by a run", f"{CHOOSE_OTHERS}, or an empty folder"
            )
        for path in inputs if fresh and _holds_a_run(folder) else []:
            if path.exists() and folder.resolve() in path.resolve().parents:
                raise UserError(
                    f"{folder} holds another run and would be set aside, with {path} in it", CHOOSE_OTHERS
                )
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_lock(folder)) for folder in folders][0]


def _is_ours(folder: Path) -> bool:
    """Did a run make the folder, or is there nothing in it yet?"""
    names = set(os.listdir(folder)) - IGNORED if os.path.isdir(folder) else set()
    return not names or LOCK in names or _holds_a_run(folder)


def _holds_a_run(folder: Path) -> bool:
    marks = ("last/manifest.json", "last/0.ckpt", "metrics.jsonl")  # the second is of nnScaler's shards
    if any(os.path.exists(folder / mark) for mark in marks):
        return True
    return bool(checkpoint.checkpoints(folder) or checkpoint.rejected_checkpoints(folder))


def check_shared(folder: Path, lock: str) -> None:
    """Raises UserError if this rank sees no such lock. Not for rank 0, which would free the lock."""
    if not (folder / LOCK).exists() or (folder / LOCK).read_text() != lock:
        raise UserError(
            f"{folder} on {os.uname().nodename} is not the folder of rank 0",
            "Name a --save_dir that all nodes share",
        )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}", CHOOSE_OTHERS) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child inherits it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(
                    f"{folder} is in use by a running process ({file.read() or 'starting'})",
                    "Wait for it, stop it, or name another --save_dir and --log_dir",
                ) from None
            logger.warning("%s cannot be locked (%s): start no second run there", folder, error)
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
        raise CheckpointError(
            f"{folder} holds another run, and is a mount point, beside which nothing can be set aside",
            CHOOSE_OTHERS,
        )
    place = folder / "aside" if folder.is_mount() else folder
    numbered = (place.with_name(f"{place.name}.{number}") for number in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    target.mkdir()
    for path in paths:
        os.rename(path, target / path.name)
    logger.warning("%s holds %s: set aside in %s", folder, what, target)


def survey(save_dir: Path, resumed: Checkpoint | None) -> tuple[Path | None, list[Path]]:
    """Return the resumed checkpoint's folder in save_dir, or None, and what the run would replace there.

    A fresh run replaces all of another one; a resumed one the checkpoints that the resumed one does not
    descend from, and folders in the place of links. A checkpoint that lies in save_dir under another name
    (a rejected one, or a folder called `last` where links were not copied) gets the folder that `make_room`
    will give it.
    """
    if not resumed:
        return None, contents(save_dir) if _holds_a_run(save_dir) else []
    path, state = resumed.path, resumed.state
    home = save_dir.resolve() / str(CheckpointName(state["epoch"], state["step"]))
    links = [save_dir / link for link in LINKS]
    replaced = [link for link in links if link.is_dir() and not link.is_symlink()]
    replaced += [older for older in checkpoint.checkpoints(save_dir) if not _descends(state, older)]
    home_is_ours = home.exists() and home not in [folder.resolve() for folder in replaced]
    if path.is_dir() and path.parent == home.parent and not home_is_ours:
        replaced = [folder for folder in replaced if folder.resolve() != path]
        home_is_ours = True
    files = [checkpoint.validation_path(folder) for folder in replaced]
    if replaced:
        files.append(save_dir / FLAGS_FILE)
    replaced += [file for file in files if file.exists()]
    if home_is_ours:
        return home, replaced
    return None, replaced


def make_room(
    save_dir: Path, home: Path | None, replaced: list[Path], resumed: Checkpoint | None = None
) -> None:
    """Set aside what `survey` returned, give the resumed checkpoint its name, and remove what a kill left."""
    for kind in ("saving", "doomed"):
        for path in save_dir.glob(f".{kind}-[0-9]*-[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)
    is_proved = home is not None and _is_proved(resumed.state, save_dir / ".good")
    if replaced:
        what = "checkpoints that this run does not continue" if home else "another run"
        set_aside(save_dir, replaced, what)
    for link in LINKS:  # before the resumed checkpoint gets a name that they may have
        path = save_dir / link
        if path.is_symlink() and not path.exists():
            path.unlink()
    if home is None:
        return
    if not home.exists():
        os.rename(resumed.path, home)
        logger.info("%s is now called %s", resumed.path, home.name)
    if is_proved:
        swap_link(save_dir, ".good", home.name)
    swap_link(save_dir, "last", home.name)


def _descends(state: dict, path: Path) -> bool:
    try:
        return checkpoint.descends_from(state, checkpoint.read_manifest(path)["state"])
    except CheckpointError:
        return False


def _is_proved(state: dict, good: Path) -> bool:
    """Return whether the good checkpoint descends from the one with that state: then steps succeeded."""
    try:
        return checkpoint.descends_from(checkpoint.read_manifest(good)["state"], state)
    except CheckpointError:
        return False


def reject(folder: Path) -> Path:
    """Rename a checkpoint to `<name>.rejected`, `<name>.rejected.1`, ...; return the first that was free."""
    name = f"{folder.name}{checkpoint.REJECTED}"
    target = folder.with_name(name)
    for number in itertools.count(1):
        if not os.path.lexists(target):
            break
        target = folder.with_name(f"{name}.{number}")
    os.rename(folder, target)
    checkpoint.sync_folder(folder.parent)
    return target


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
        logger.warning("the old checkpoint %s cannot be removed: %s", folder, error)
