"""Checkpoints for reading: open and verify them, read any part on any world size, merge them into one file.

On disk: `<save_dir>/{epoch:04d}-{step:04d}/` with `manifest.json` and one safetensors shard per rank. A shard holds
the rank's boxes of the global tensors, and its metadata says where each box lies. `last` and `best` are symbolic
links. The loss of a validation lies beside the folder, because it is known only after the save.
"""

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from trainer.tensorfile import CHUNK_BYTES, Box, TensorFileReader, TensorFileWriter, file_digest

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong."""


@dataclass(frozen=True)
class CheckpointName:
    """The name of a checkpoint's folder."""

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"{self.epoch:04d}-{self.step:04d}"

    @classmethod
    def parse(cls, text: str) -> "CheckpointName | None":
        """None if the text is not such a name."""
        return cls(*map(int, text.split("-"))) if re.fullmatch(r"\d{4,}-\d{4,}", text) else None


def saving_path(folder: Path) -> Path:
    """The folder in which the checkpoint is written before it gets its name."""
    return folder.with_name(f".saving-{folder.name}")


def replaced_path(folder: Path) -> Path:
    """Where an older checkpoint of the same name waits until the new one has its name, or is being deleted."""
    return folder.with_name(f".replaced-{folder.name}")


def validation_path(folder: Path) -> Path:
    """The file with the checkpoint's validation loss."""
    return folder.with_name(f"{folder.name}.validation.json")


def checkpoints(save_dir: Path) -> list[Path]:
    """Finished checkpoint folders, the newest step first."""
    found = [
        path
        for path in save_dir.glob("*-*")
        if CheckpointName.parse(path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; 0 for another name."""
    name = CheckpointName.parse(folder.name)
    return name.step if name else 0


def candidates(save_dir: Path, which: str) -> list[Path]:
    """The folders where 'last' or 'best' may be found, in the order in which to try them.

    First the one that the link names; for 'last' then every other checkpoint, the newest first.
    """
    link = save_dir / which
    named = [save_dir / link.readlink()] if link.is_symlink() else []
    # A save that was killed between its two renames left the checkpoint under its other name.
    found = [path for folder in named for path in (folder, replaced_path(folder)) if path.is_dir()]
    if which == "last":
        others = [path for path in checkpoints(save_dir) if path not in named]
        # Checkpoints newer than `last` belong to an abandoned run: try them last.
        newest = step_of(named[0]) if named else math.inf
        found += sorted(others, key=lambda path: step_of(path) > newest)
    return found


def json_digest(value: dict) -> str:
    """The checksum of a JSON value, whatever its formatting."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> dict:
    """Returns the manifest after checking it and the sizes of its files; raises CheckpointError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        state, files, checksum = manifest["state"], manifest["files"], manifest["checksum"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}): it was damaged after it was saved"
        ) from None
    if json_digest({"state": state, "files": files}) != checksum:
        raise CheckpointError(f"{path} does not match its own checksum: it was altered after it was saved")
    for name, entry in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: the checkpoint is not whole")
        if (size := (folder / name).stat().st_size) != entry["size"]:
            raise CheckpointError(
                f"{folder / name} has {size} bytes, {entry['size']} were saved: it was damaged after it was saved"
            )
    return manifest


def read_validation(folder: Path) -> float | None:
    """The checkpoint's validation loss; None if its validation did not finish."""
    try:
        return float(json.loads(validation_path(folder).read_text())["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class Checkpoint:
    """A checkpoint opened for reading: a folder of shards, or a merged file.

    state: what was given to save (step, epoch, samples, world_size, ...). tensors: name -> (dtype, whole shape).
    boxes: name -> {box: the file that holds it}. checks: (what, expected checksum, function that computes it).
    rng: the random state of each rank (a merged file has none). val_loss: None if it was not validated.
    """

    path: Path
    state: dict
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(repr=False)
    boxes: dict[str, dict[Box, TensorFileReader]] = field(repr=False)
    checks: list[tuple[str, str, Callable[[], str]]] = field(repr=False, default_factory=list)
    rng: list[str] = field(repr=False, default_factory=list)
    val_loss: float | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads the headers and checks every file's size; raises CheckpointError if the checkpoint is not whole."""
        path = Path(path).resolve()
        try:
            return cls._open_folder(path) if path.is_dir() else cls._open_merged(path)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cannot be read: {error}") from None

    @classmethod
    def _open_folder(cls, path: Path) -> "Checkpoint":
        manifest = read_manifest(path)
        opened = cls(path, manifest["state"], {}, {}, val_loss=read_validation(path))
        for name, entry in sorted(manifest["files"].items()):
            reader = TensorFileReader(path / name)
            opened.checks.append(
                (str(path / name), entry["xxh3_128"], functools.partial(file_digest, path / name))
            )
            try:
                opened.rng.append(reader.metadata["rng"])
                for key, (shape, offsets) in json.loads(reader.metadata["boxes"]).items():
                    dtype, held_shape = reader.tensors[key]
                    opened.tensors[key] = (dtype, tuple(shape))
                    # Ranks that hold the same box (replicas) count once.
                    opened.boxes.setdefault(key, {})[Box(tuple(offsets), held_shape)] = reader
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{path / name} is damaged: its header makes no sense ({error!r})"
                ) from None
        return opened

    @classmethod
    def _open_merged(cls, path: Path) -> "Checkpoint":
        reader = TensorFileReader(path)
        if "state" not in reader.metadata:
            raise CheckpointError(
                f"{path} holds no training state: give a checkpoint folder, or a file that --merge_checkpoint wrote"
            )
        state, digests = json.loads(reader.metadata["state"]), json.loads(reader.metadata["digests"])
        if json_digest(state) != reader.metadata.get("state_digest") or set(digests) != set(reader.tensors):
            raise CheckpointError(
                f"{path}: its metadata was altered after it was merged: merge the checkpoint again"
            )
        boxes = {name: {Box.whole(shape): reader} for name, (_, shape) in reader.tensors.items()}
        checks = [
            (f"{path}, tensor {name}", digest, functools.partial(reader.tensor_digest, name))
            for name, digest in sorted(digests.items())
        ]
        return cls(path, state, reader.tensors, boxes, checks, val_loss=state.get("val_loss"))

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Checks every `parts`-th file (of a merged file: tensor) against its checksum; raises CheckpointError."""
        for what, expected, compute in self.checks[part::parts]:
            try:
                found = compute()
            except OSError as error:
                raise CheckpointError(f"{what} cannot be read: {error}") from None
            if found != expected:
                raise CheckpointError(
                    f"{what}: the contents do not match the checksum: damaged or exchanged after it was saved"
                )

    def read(self, name: str, box: Box | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copies a box of the tensor (default: all of it) into `out`, or into a new tensor on the CPU.

        Raises CheckpointError if the checkpoint does not hold all of it.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}: it was saved from another model")
        dtype, shape = self.tensors[name]
        box = box or Box.whole(shape)
        out = torch.empty(box.shape, dtype=dtype) if out is None else out
        missing = box.size
        for held, reader in self.boxes[name].items():
            common = box.overlap(held)
            if common is not None:
                out[common.inside(box).slices].copy_(reader.read(name, common.inside(held)))
                missing -= common.size
        if missing:
            raise CheckpointError(
                f"{self.path}: {missing} of {box.size} elements of tensor {name} are missing"
            )
        return out

    def read_rows(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in runs of whole rows; each run reuses the memory of the one before."""
        dtype, shape = self.tensors[name]
        if not shape:
            yield self.read(name)
            return
        rows = max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
        memory = torch.empty((min(rows, shape[0]), *shape[1:]), dtype=dtype)
        for first in range(0, shape[0], rows):
            box = Box((first, *[0] * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:]))
            yield self.read(name, box, out=memory[: box.shape[0]])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> whole shape."""
        return {
            n.removeprefix("model."): shape
            for n, (_, shape) in self.tensors.items()
            if n.startswith("model.")
        }

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every model parameter, one at a time."""
        for name in self.shapes:
            yield name, self.read(f"model.{name}")


def merge(source: str | Path, out_file: str | Path) -> Path:
    """Merges a checkpoint folder into one safetensors file, a few rows at a time; raises CheckpointError.

    One pass verifies the shards, a second one copies. The file's metadata holds the state and each tensor's checksum.
    """
    checkpoint, out_file = Checkpoint.open(source), Path(out_file)
    checkpoint.verify()
    state = {**checkpoint.state, "val_loss": checkpoint.val_loss}
    metadata = {"state": json.dumps(state), "state_digest": json_digest(state)}
    unknown = dict.fromkeys(checkpoint.tensors, "0" * 32)
    with (
        temporary_sibling(out_file) as temporary,
        TensorFileWriter(
            temporary, checkpoint.tensors, {**metadata, "digests": json.dumps(unknown)}
        ) as writer,
    ):
        for name in checkpoint.tensors:
            writer.add_in_parts(name, checkpoint.read_rows(name))
        writer.replace_metadata({**metadata, "digests": json.dumps(writer.digests)})
        writer.finish()
    return out_file


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yields a name beside `path`, which is renamed to `path` if the block succeeds and removed if it fails.

    OSErrors carry the name of `path`.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # the parent may not be a folder, or not writable
            temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flushes the folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
