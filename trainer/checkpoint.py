"""Checkpoints for reading: open and verify them, read any part on any world size, merge them into one file.

On disk: `<save_dir>/{epoch:04d}-{step:04d}/` with `manifest.json` and one safetensors shard per rank. A shard
holds the rank's boxes of the global tensors, and its metadata says where each box lies. `last` and `best` are
symbolic links. A validation's loss lies beside the folder, because it is known only after the save. A loss
that is not finite adds `.rejected` to the folder's name.
"""

import contextlib
import functools
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

from errors import UserError
from trainer.tensorfile import (
    Box,
    TensorFileError,
    TensorFileReader,
    TensorFileWriter,
    file_digest,
    tensor_digest,
)

MANIFEST = "manifest.json"
NAME_A_CHECKPOINT = "Name a checkpoint folder, or a file from --merge_checkpoint"
USE_ANOTHER = "Use another checkpoint"
REJECTED = ".rejected"  # follows the name of a checkpoint whose validation loss was not finite


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the problem names the file."""


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


def hidden_path(folder: Path, what: str) -> Path:
    """Where a checkpoint is written until it gets its name ('saving'), or is deleted ('doomed')."""
    return folder.with_name(f".{what}-{folder.name}")


def validation_path(folder: Path) -> Path:
    """The file with the checkpoint's validation loss."""
    return folder.with_name(f"{folder.name}.validation.json")


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; -1 for another name."""
    name = CheckpointName.parse(folder.name)
    return name.step if name else -1


def checkpoints(save_dir: Path) -> list[Path]:
    """Finished checkpoint folders, the newest step first."""
    found = [path for path in save_dir.glob("*-*") if step_of(path) >= 0 and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns), reverse=True)


def rejected_checkpoints(save_dir: Path) -> list[Path]:
    """Return the checkpoints that were set aside because their validation loss was not finite."""
    folders = save_dir.glob(f"*-*{REJECTED}*")
    return sorted(folder for folder in folders if (folder / MANIFEST).is_file())


def candidates(save_dir: Path, which: str) -> list[Path]:
    """The folders where 'last' or 'best' may be found, in the order in which to try them.

    First the one that the link names, or a folder of that name; for 'last' then every other checkpoint, the
    newest first. Raises CheckpointError if the link leads out of save_dir, or if there are only others.
    """
    named, found = save_dir / which, checkpoints(save_dir)
    if named.is_symlink():
        named = save_dir / named.readlink()
        if named.parent.resolve() != save_dir.resolve():
            raise CheckpointError(
                f"{save_dir / which} leads to a checkpoint of another folder",
                f"Resume it with --resume_from={named.resolve()}",
            )
    if which == "last":
        # A run that ended with broken weights left them newer than `last`: try these at the end.
        others, limit = [path for path in found if path != named], step_of(named)
        others.sort(key=lambda path: 0 <= limit < step_of(path))
        return [*([named] if named.is_dir() else []), *others]
    if found and not named.is_dir():
        raise CheckpointError(
            f"{save_dir} holds {found[0].name} and others, but no '{which}'",
            "Resume from 'last', or name one of them",
        )
    return [named] if named.is_dir() else []


def lineage(state: dict) -> list[list]:
    """[run, step] of each run that led to the checkpoint, up to which step; its own is the last."""
    return [*state.get("parents", []), [state.get("run"), state["step"]]]


def descends_from(state: dict, older: dict) -> bool:
    """Did the run come by the older checkpoint on its way to this one?"""
    return any(run == older.get("run") and older["step"] <= step for run, step in lineage(state))


def json_digest(value: dict) -> str:
    """The checksum of a JSON value, whatever its formatting."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> dict:
    """Returns the manifest after checking it and the sizes of its files; raises CheckpointError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        body, checksum = {"state": manifest["state"], "files": manifest["files"]}, manifest["checksum"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a checkpoint ({MANIFEST} is missing)", NAME_A_CHECKPOINT
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} was damaged after it was saved: {error!r}", USE_ANOTHER) from None
    if json_digest(body) != checksum:
        raise CheckpointError(
            f"{path} does not match its own checksum: it was altered after it was saved", USE_ANOTHER
        )
    for name, entry in body["files"].items():
        if name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, which is not a file beside it", USE_ANOTHER)
        file, saved = folder / name, entry["size"]
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is not whole", USE_ANOTHER)
        if (size := file.stat().st_size) != saved:
            raise CheckpointError(f"{file} has {size} bytes, and {saved} were saved", USE_ANOTHER)
    return body


def read_validation(folder: Path) -> float | None:
    """The checkpoint's validation loss; None if its validation did not finish."""
    try:
        return float(json.loads(validation_path(folder).read_text())["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class Checkpoint:
    """Tensors opened for reading: a folder of shards, a merged file, or a pretrained model's files.

    state: what was given to save (step, epoch, samples, world_size, ...).
    tensors: name -> (dtype, whole shape). boxes: name -> {box: the file that holds it}.
    checks: (what, expected checksum, function that computes it).
    rng: the random state of each rank (a merged file has none). val_loss: None if it was not validated.
    """

    path: Path
    state: dict = field(default_factory=dict)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(repr=False, default_factory=dict)
    boxes: dict[str, dict[Box, TensorFileReader]] = field(repr=False, default_factory=dict)
    checks: list[tuple[str, str, Callable[[], str]]] = field(repr=False, default_factory=list)
    rng: list[str] = field(repr=False, default_factory=list)
    val_loss: float | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads the headers and checks every file's size; raises CheckpointError if it is not whole."""
        path = Path(path).resolve()
        try:
            return cls._open_folder(path) if path.is_dir() else cls._open_merged(path)
        except CheckpointError:
            raise
        except (TensorFileError, ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a checkpoint, or is damaged: {error}", NAME_A_CHECKPOINT
            ) from None

    @classmethod
    def _open_folder(cls, path: Path) -> "Checkpoint":
        manifest = read_manifest(path)
        opened = cls(path, manifest["state"], val_loss=read_validation(path))
        for name, entry in sorted(manifest["files"].items()):
            file = path / name
            reader = TensorFileReader(file)
            opened.checks.append((str(file), entry["xxh3_128"], functools.partial(file_digest, file)))
            try:
                opened.rng.append(reader.metadata["rng"])
                for key, (shape, offsets) in json.loads(reader.metadata["boxes"]).items():
                    dtype, held_shape = reader.tensors[key]
                    opened.tensors[key] = (dtype, tuple(shape))
                    # A box that several ranks hold (replicas) counts once.
                    opened.boxes.setdefault(key, {})[Box(tuple(offsets), held_shape)] = reader
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(f"the header of {file} is damaged: {error!r}", USE_ANOTHER) from None
        return opened

    @classmethod
    def _open_merged(cls, path: Path) -> "Checkpoint":
        reader = TensorFileReader(path)
        if "state" not in reader.metadata:
            raise CheckpointError(f"{path} holds no training state", NAME_A_CHECKPOINT)
        state, digests = json.loads(reader.metadata["state"]), json.loads(reader.metadata["digests"])
        if json_digest(state) != reader.metadata.get("state_digest") or set(digests) != set(reader.tensors):
            raise CheckpointError(f"the metadata of {path} was altered", "Merge the checkpoint again")
        opened = cls(path, state, val_loss=state.get("val_loss"))
        for name, digest in sorted(digests.items()):
            opened._add_whole(name, reader)
            compute = functools.partial(reader.tensor_digest, name)
            opened.checks.append((f"{path}, tensor {name}", digest, compute))
        return opened

    @classmethod
    def of_weights(cls, files: dict[str, Path]) -> "Checkpoint":
        """A pretrained model's weights, which have no state and no checksums. files: name -> file."""
        readers = {path: TensorFileReader(path) for path in dict.fromkeys(files.values())}
        opened = cls(next(iter(readers)).parent)
        for name, path in files.items():
            opened._add_whole(name, readers[path])
        return opened

    def _add_whole(self, name: str, reader: TensorFileReader) -> None:
        self.tensors[name] = reader.tensors[name]
        self.boxes[name] = {Box.whole(reader.tensors[name][1]): reader}

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Checks each `parts`-th file (in a merged file: tensor); raises CheckpointError if it is damaged."""
        for what, expected, compute in self.checks[part::parts]:
            try:
                found = compute()
            except OSError as error:
                raise CheckpointError(f"{what} cannot be read: {error}", USE_ANOTHER) from None
            if found != expected:
                raise CheckpointError(f"{what} does not match its checksum", USE_ANOTHER)

    def read(self, name: str, box: Box | None = None, out=None, expected: tuple | None = None):
        """Copies a box of the tensor (default: all of it) into `out`, or into a new tensor on the CPU.

        Raises CheckpointError if it is not all there, or if the whole tensor's shape is not the expected one.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}", "Give the flags of its model")
        dtype, shape = self.tensors[name]
        if expected not in (None, shape):
            raise CheckpointError(
                f"{name} in {self.path} has shape {shape}, and this model's has shape {expected}",
                "Give the flags of the checkpoint's model",
            )
        box = box or Box.whole(shape)
        out = torch.empty(box.shape, dtype=dtype) if out is None else out
        missing = box.size
        for held, reader in self.boxes[name].items():
            common = box.overlap(held)
            if common is not None:
                out[common.inside(box)].copy_(reader.read(name, common.inside(held)))
                missing -= common.size
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {missing} of {box.size} elements of tensor {name}", USE_ANOTHER
            )
        return out

    def digests(self, part: int = 0, parts: int = 1) -> dict[str, str]:
        """The checksum of each `parts`-th tensor of a pretrained model, by name."""
        held = {name: reader for name in sorted(self.boxes) for reader in self.boxes[name].values()}
        return {name: held[name].tensor_digest(name) for name in list(held)[part::parts]}

    def check_frozen(self, digest: str) -> None:
        """Raises CheckpointError if the weights that this adapter belongs to have another checksum."""
        if self.state.get("frozen") != digest:
            model_id = self.state["config"]["model_id"]
            raise CheckpointError(
                f"{self.path} was trained on base weights that differ from the current {model_id}",
                "Give the --model_id of the same weights",
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> whole shape."""
        model = [name for name in self.tensors if name.startswith("model.")]
        return {name.removeprefix("model."): self.tensors[name][1] for name in model}

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every model parameter, one at a time."""
        for name in self.shapes:
            yield name, self.read(f"model.{name}")

    def merge(self, out_file: Path) -> Path:
        """Merges the shards into one safetensors file, a tensor at a time; raises CheckpointError.

        One pass verifies the shards, a second one copies. The metadata holds the state and each tensor's
        checksum. An earlier merged file is replaced; anything else is not.
        """
        if out_file.exists() and not _is_merged(out_file):
            raise CheckpointError(
                f"{out_file} exists and is not a merged checkpoint", "Give another --output_path"
            )
        self.verify()
        state = {**self.state, "val_loss": self.val_loss}
        metadata = {"state": json.dumps(state), "state_digest": json_digest(state)}
        digests = dict.fromkeys(self.tensors, "0" * 32)  # the checksums follow after the copying
        metadata["digests"] = json.dumps(digests)
        with temporary_sibling(out_file) as new, TensorFileWriter(new, self.tensors, metadata) as writer:
            for name in self.tensors:
                writer.add(name, tensor := self.read(name))
                digests[name] = tensor_digest(tensor)
                del tensor  # free it before the next one is read
            writer.replace_metadata({**metadata, "digests": json.dumps(digests)})
            writer.finish()
        return out_file


def _is_merged(path: Path) -> bool:
    try:
        return path.is_file() and "state_digest" in TensorFileReader(path).metadata
    except TensorFileError:
        return False


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yields a name that becomes `path` if the block succeeds, and is removed if it fails.

    Removes what processes of this machine that were killed left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.{os.uname().nodename}-"
    for left in path.parent.glob(f"{glob.escape(mark)}*.new"):
        if not Path("/proc", left.name.removeprefix(mark).split(".")[0]).exists():
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{mark}{os.getpid()}.new")
    try:
        yield temporary
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flushes the folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
