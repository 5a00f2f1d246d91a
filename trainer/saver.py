"""Saves checkpoints that are whole or absent, in a thread if wanted; prunes old ones."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from errors import TrainingFailed
from trainer import checkpoint, folders, parallel, ranks
from trainer.checkpoint import CheckpointName, hidden_path, sync_folder
from trainer.tensorfile import Box, TensorFileWriter

KEPT_TRANSIENT = 3
# The whole tensor's shape, this rank's box of it, and the values in the box.
Part = tuple[tuple[int, ...], Box, torch.Tensor]


class Saver:
    """Writes one checkpoint at a time, all ranks together.

    background: save in a thread. group: a gloo process group for this alone, because a background save
    communicates while training does too. resumed: the checkpoint that was resumed. A failed save is the same
    TrainingFailed on every rank: `save` raises it, or the `wait` after a background save.
    """

    def __init__(self, save_dir: Path, keep_last: int | None, background: bool, group, resumed: Path | None):
        self.save_dir, self.keep_last, self.background, self.group = save_dir, keep_last, background, group
        self.is_first = dist.get_rank() == 0
        self.blocked_seconds = self.total_seconds = 0.0  # of the last save
        link = save_dir / ".good"
        self.good = link.resolve() if link.exists() else None  # the newest from which a step succeeded
        self.newest = resumed if resumed != self.good else None  # not known to be good
        self._proved = False  # has a step succeeded from it?
        self._thread, self._saving = ThreadPoolExecutor(1, "checkpoint"), None

    def save(
        self, name: CheckpointName, tensors: dict, state: dict, rng: str, began: float, move_last: bool = True
    ) -> None:
        """Saves the tensors (name -> tensor, distributed or not) as `<save_dir>/<name>`, for `last` to name.

        rng: this rank's random state. began: time.perf_counter() when the caller began. In the background,
        the caller may change the tensors as soon as this returns.
        """
        self.wait()
        folder = self.save_dir / str(name)
        if self.is_first:  # of a checkpoint that someone removed by hand
            checkpoint.validation_path(folder).unlink(missing_ok=True)
        parts = {
            key: (tuple(tensor.shape), parallel.local_box(tensor), parallel.local(tensor))
            for key, tensor in tensors.items()
            if parallel.is_first_replica(tensor)
        }
        if self.background:
            parts = {key: (shape, box, _host_copy(data)) for key, (shape, box, data) in parts.items()}
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # training may change the tensors only after the copies are complete
            self._saving = self._thread.submit(self._write, folder, parts, state, rng, began, move_last)
        else:
            self._write(folder, parts, state, rng, began, move_last)
        self.newest, self._proved = folder, False
        self.blocked_seconds = time.perf_counter() - began

    def wait(self) -> None:
        """Returns once the last save is on disk; raises its error."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()
        self._promote()

    @property
    def busy(self) -> bool:
        return self._saving is not None and not self._saving.done()

    @property
    def failed(self) -> bool:
        """Will `wait` raise?"""
        return bool(self._saving) and self._saving.done() and self._saving.exception() is not None

    def record_validation(self, name: CheckpointName, val_loss: float) -> None:
        """Writes the loss beside the checkpoint, and moves `best`. Only rank 0 calls this."""
        _write_json(checkpoint.validation_path(self.save_dir / str(name)), {"val_loss": val_loss})
        self.update_best()

    def update_best(self) -> None:
        """Points `best` at the checkpoint with the lowest validation loss. Only rank 0 calls this."""
        losses = {path: checkpoint.read_validation(path) for path in self._up_to(self.newest or self.good)}
        known = [path for path in reversed(losses) if losses[path] is not None]  # the first of equals wins
        if known:
            folders.swap_link(self.save_dir, "best", min(known, key=losses.get).name)

    def confirm(self) -> None:
        """A step succeeded from the newest checkpoint, so it is good."""
        self._proved = True
        if not self.busy:
            self._promote()

    def _promote(self) -> None:
        if self.newest and self._proved:
            self.good, self.newest = self.newest.resolve(), None
            here = self.good.parent == self.save_dir.resolve() and checkpoint.step_of(self.good) >= 0
            if here and self.is_first:
                folders.swap_link(self.save_dir, ".good", self.good.name)

    def prune(self, newest: Path | None) -> None:
        """Remove checkpoints that need not stay, counted from the newest good one. Only rank 0 calls this.

        With `keep_last` the newest of them stay. Without it all stay but those of an epoch's end, of time and
        of SIGTERM, of which the newest three do. What a link names is never removed.
        """
        finished = self._up_to(newest)
        if self.keep_last:
            surplus = finished[self.keep_last :]
        else:
            surplus = [path for path in finished if _is_transient(path)][KEPT_TRANSIENT:]
        named = {(self.save_dir / link).resolve() for link in folders.LINKS}
        for path in surplus:
            if path.resolve() not in named:
                folders.remove(path)

    def retreat(self) -> None:
        """Let `last` name the good checkpoint again, if it lies here: the steps from the newest failed."""
        self.wait()
        if self.is_first and self._is_here(self.newest) and self._is_here(self.good):
            folders.swap_link(self.save_dir, "last", self.good.name)

    def reject(self) -> Path | None:
        """Set the newest checkpoint aside, as its validation loss is not finite; return its new path.

        Return None, and touch nothing, if a step has succeeded from it, if an earlier validation of it was
        finite, or if it is not a checkpoint of save_dir. All ranks call this.
        """
        self.wait()
        rejected, self.good = ranks.by_first_rank(self._set_newest_aside, group=self.group)
        if rejected:
            self.newest = None
        return rejected

    def _set_newest_aside(self) -> tuple[Path | None, Path | None]:
        """Return the rejected checkpoint's path and the good one's.

        `last` moves first: a kill before the renaming leaves two whole checkpoints.
        """
        newest = self.newest
        if not self._is_here(newest) or checkpoint.step_of(newest) < 0:
            return None, self.good
        if checkpoint.read_validation(newest) is not None:
            return None, self.good
        good = self.good
        if not self._is_here(good):
            older = [path.resolve() for path in self._up_to(newest) if path.resolve() != newest.resolve()]
            good = next(iter(older), good)  # a later save proved it
        if self._is_here(good):
            folders.swap_link(self.save_dir, "last", good.name)
        else:
            (self.save_dir / "last").unlink(missing_ok=True)
        sync_folder(self.save_dir)
        return folders.reject(self.save_dir / newest.name), good

    def _is_here(self, path: Path | None) -> bool:
        return path is not None and path.resolve().parent == self.save_dir.resolve()

    def last_good(self) -> str:
        """Says which checkpoint to continue from."""
        if self.good:
            return f"the last good checkpoint is {self.good}"
        return f"there is only {self.newest}, untried" if self.newest else "no checkpoint was saved before"

    def _up_to(self, folder: Path | None) -> list[Path]:
        """Finished checkpoints, the newest first; later steps than the folder's are an abandoned run's."""
        limit = checkpoint.step_of(folder) if folder else -1
        return [path for path in checkpoint.checkpoints(self.save_dir) if checkpoint.step_of(path) <= limit]

    def _write(
        self, folder: Path, parts: dict[str, Part], state: dict, rng: str, began: float, move_last
    ) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        temporary = hidden_path(folder, "saving")

        def prepare():
            self.save_dir.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

        def write_shard():
            file = f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
            specs = {name: (data.dtype, box.shape) for name, (_, box, data) in parts.items()}
            boxes = json.dumps({name: (shape, box.offsets) for name, (shape, box, _) in parts.items()})
            with TensorFileWriter(temporary / file, specs, {"boxes": boxes, "rng": rng}) as writer:
                for name, (_, _, data) in parts.items():
                    writer.add(name, data)
                return file, writer.finish()

        group = dict(group=self.group)
        try:
            ranks.by_first_rank(prepare, **group)
            files = dict(ranks.gathered(ranks.together(write_shard, **group), **group))
            ranks.by_first_rank(self._publish, folder, files, state, move_last, **group)
        except OSError as error:  # the same on all ranks
            if self.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            what = f"{error.strerror or error} ({error.filename or 'while writing'})"
            fix = "make room or choose another --save_dir, then --resume_from=last"
            raise TrainingFailed(
                f"checkpoint {folder} could not be saved: {what}. "
                f"The checkpoints before it are untouched; {fix}"
            ) from None
        self.total_seconds = time.perf_counter() - began

    def _publish(self, folder: Path, files: dict, state: dict, move_last: bool) -> None:
        """All data is on disk; only renames remain. A kill between any two leaves whole checkpoints."""
        temporary = hidden_path(folder, "saving")
        body = json.loads(json.dumps({"state": state, "files": files}))  # as it is read: keys are strings
        _write_json(temporary / checkpoint.MANIFEST, {**body, "checksum": checkpoint.json_digest(body)})
        sync_folder(temporary)
        if folder.exists():  # a damaged one without a manifest: others are set aside
            folders.remove(folder)
        os.rename(temporary, folder)
        sync_folder(self.save_dir)
        if move_last:
            folders.swap_link(self.save_dir, "last", folder.name)
            sync_folder(self.save_dir)


def _is_transient(folder: Path) -> bool:
    """Return whether a checkpoint was saved only to lose little: by an epoch's end, time or SIGTERM."""
    try:
        state = json.loads((folder / checkpoint.MANIFEST).read_text())["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if state.get("reason") == "signal":
        return state.get("signal") != "SIGUSR1"
    return state.get("reason") in ("epoch", "time")


def _host_copy(data: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return copy.copy_(data.detach(), non_blocking=True)


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
