"""Checkpoints: whole or absent, verified on load, readable on any world size, merged in bounded memory.

On disk: `<save_dir>/{epoch:04d}-{step:04d}/` with `manifest.json` and one safetensors shard a rank. A shard holds the rank's boxes of
the global tensors; its metadata says where each box lies. `last` and `best` are symbolic links, swapped by rename.
"""

import base64
import contextlib
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from trainer import foreign
from trainer.tensorfile import CHUNK_BYTES, Box, TensorFileError, TensorFileReader, TensorFileWriter

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"\d{4,}-\d{4,}")
_TEMPORARY = re.compile(r"\.(saving|replaced)-\d{4,}-\d{4,}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or written; the message names the file and what is wrong."""


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says why, and what is left to continue from."""


@dataclass
class Piece:
    """One rank's box of one tensor, as it is to be saved. `data` may live on any device."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    box: Box
    data: torch.Tensor


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _digest(value: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


# ---------------------------------------------------------------- reading


@dataclass
class Checkpoint:
    """A checkpoint opened for reading, a folder of shards or a merged file."""

    path: Path
    state: dict  # step, epoch, samples, world_size, ...: what was given to save
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(repr=False)
    parts: dict[str, list[tuple[TensorFileReader, Box]]] = field(
        repr=False
    )  # where the boxes of each tensor lie
    checksums: dict[str, str] = field(repr=False)  # of each file of a folder, of each tensor of a merged file
    rng: list[str] = field(default_factory=list, repr=False)  # a rank each; a merged file has none

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Reads what describes the checkpoint and checks every file's size; raises CheckpointError where it is not whole."""
        path = Path(path).resolve()
        try:
            if path.is_dir():
                return cls._open_shards(path) if foreign.is_shards(path) else cls._open_folder(path)
            return cls._open_foreign(path) if foreign.is_merged(path) else cls._open_merged(path)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cannot be read: {error}") from None

    @classmethod
    def _open_folder(cls, path: Path) -> "Checkpoint":
        manifest = read_manifest(path)
        tensors, parts, rng = {}, {}, []
        for name in sorted(manifest["files"]):
            reader = TensorFileReader(path / name)
            try:
                rng.append(reader.metadata["rng"])
                for key, (shape, offsets) in json.loads(reader.metadata["boxes"]).items():
                    dtype, held = reader.tensors[key]
                    tensors[key] = (dtype, tuple(shape))
                    parts.setdefault(key, []).append((reader, Box(tuple(offsets), held)))
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{path / name} is damaged: its header makes no sense ({error!r})"
                ) from None
        return cls(
            path,
            manifest["state"],
            tensors,
            parts,
            {n: e["xxh3_128"] for n, e in manifest["files"].items()},
            rng,
        )

    @classmethod
    def _open_merged(cls, path: Path) -> "Checkpoint":
        reader = TensorFileReader(path)
        if "state" not in reader.metadata:
            raise CheckpointError(
                f"{path} holds no training state: give a checkpoint folder, or a file that --merge_checkpoint wrote"
            )
        state, checksums = json.loads(reader.metadata["state"]), json.loads(reader.metadata["digests"])
        if _digest(state) != reader.metadata.get("state_digest") or set(checksums) != set(reader.tensors):
            raise CheckpointError(
                f"{path}: its metadata was altered after it was merged: merge the checkpoint again"
            )
        parts = {name: [(reader, Box.whole(shape))] for name, (_, shape) in reader.tensors.items()}
        return cls(path, state, reader.tensors, parts, checksums)

    @classmethod
    def _open_shards(cls, path: Path) -> "Checkpoint":
        try:
            return cls(path, foreign.shards_state(path), {}, {}, {})
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} holds nnScaler's shards of another script ({error}): merge them with it first"
            ) from None

    @classmethod
    def open_whole(cls, path: str | Path) -> "Checkpoint":
        """As `open`, but nnScaler's shards can be read too: nnScaler merges them into a file that lives as long as the result."""
        path = Path(path).resolve()
        if not foreign.is_shards(path):
            return cls.open(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".merging-") as folder:
            foreign.merge(path, Path(folder) / "merged.ckpt")
            checkpoint = cls.open(Path(folder) / "merged.ckpt")
        checkpoint.path = path
        return checkpoint

    @classmethod
    def _open_foreign(cls, path: Path) -> "Checkpoint":
        try:
            file = foreign.MergedFile(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        tensors = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in file.tensors.items()}
        return cls(
            path,
            file.state,
            tensors,
            {name: [(file, Box.whole(shape))] for name, (_, shape) in tensors.items()},
            {},
        )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Checks every `parts`-th file (of a merged file: tensor) against its checksum; raises CheckpointError."""
        if not self.tensors:
            raise CheckpointError(
                f"{self.path} holds nnScaler's shards: first run `python train.py --merge_checkpoint={self.path}`"
            )
        in_files = self.path.is_dir() and self.checksums
        readers = (
            {reader.path: reader for pieces in self.parts.values() for reader, _ in pieces}
            if in_files
            else {}
        )
        for name in sorted(self.checksums)[part::parts]:
            where = self.path / name if self.path.is_dir() else f"{self.path}, tensor {name}"
            try:
                digest = (
                    readers[where].file_digest() if readers else self.parts[name][0][0].tensor_digest(name)
                )
            except (OSError, TensorFileError) as error:
                raise CheckpointError(f"{where} cannot be read: {error}") from None
            if digest != self.checksums[name]:
                raise CheckpointError(
                    f"{where}: the contents do not match the checksum: damaged or exchanged after it was saved"
                )

    def read(self, name: str, box: Box | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """A box of the tensor (default: the whole), put into `out` or a new tensor on the CPU; CheckpointError: it is not all there."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}: it was saved from another model")
        dtype, shape = self.tensors[name]
        box = box or Box.whole(shape)
        if out is not None and (out.device.type != "cpu" or out.dtype != dtype):
            return out.copy_(self.read(name, box))
        result, missing = torch.empty(box.shape, dtype=dtype) if out is None else out, box.size
        for reader, held in self.parts[name]:
            common = box.overlap(held)
            if common is None:
                continue
            missing -= common.size
            reader.read(name, common.inside(held), out=result[common.inside(box).slices])
        if missing:
            raise CheckpointError(
                f"{self.path}: {missing} of {box.size} elements of tensor {name} are missing"
            )
        return result

    def read_in_parts(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in runs of whole rows, each in the memory of the one before."""
        dtype, shape = self.tensors[name]
        if not shape:
            yield self.read(name)
            return
        rows = max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
        memory = torch.empty((min(rows, shape[0]), *shape[1:]), dtype=dtype)
        for first in range(0, shape[0], rows):
            box = Box((first, *[0] * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:]))
            yield self.read(name, box, out=memory[: box.shape[0]])

    def hash_what_is_read(self) -> None:
        """From now on: a later `verify` needs no second pass over files that were read from front to back."""
        for reader in (
            {reader for pieces in self.parts.values() for reader, _ in pieces} if self.path.is_dir() else ()
        ):
            reader.start_digest()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every model parameter, one after the other."""
        for name in self.tensors:
            if name.startswith("model."):
                yield name.removeprefix("model."), self.read(name)


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder, after checking that it and the sizes of its files are right; raises CheckpointError."""
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
    if _digest({"state": state, "files": files}) != checksum:
        raise CheckpointError(f"{path} does not match its own checksum: it was altered after it was saved")
    for name, entry in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: the checkpoint is not whole")
        if (size := (folder / name).stat().st_size) != entry["size"]:
            raise CheckpointError(
                f"{folder / name} has {size} bytes, {entry['size']} were saved: it was damaged after it was saved"
            )
    return manifest


def candidates(save_dir: Path, which: str) -> list[Path]:
    """Where `last` or `best` may be found, the most wanted first: what the link names, then for `last` every checkpoint, newest first."""
    link = save_dir / which
    first = [save_dir / link.readlink()] if link.is_symlink() else [link] if foreign.is_shards(link) else []
    # A later one than the link names is of a run that was abandoned: the last resort.
    limit = _step(first[0]) if first and _NAME.fullmatch(first[0].name) else math.inf
    others = [path for path in checkpoints(save_dir) if path not in first] if which == "last" else []
    others.sort(key=lambda path: _step(path) > limit)
    # A save killed between its two renames left the checkpoint that it was to replace under another name.
    first += [path.with_name(f".replaced-{path.name}") for path in first]
    return [path for path in first if path.is_dir()] + others


def checkpoints(save_dir: Path) -> list[Path]:
    """Finished checkpoint folders, newest first."""
    found = [
        path for path in save_dir.glob("*-*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


# ---------------------------------------------------------------- saving


class Saver:
    """Writes checkpoints, all ranks together, in the foreground or in a thread of its own; one at a time.

    group: a gloo process group for this alone, as the thread talks while the training does. A failure is the same TrainingFailed on
    every rank: raised by `save`, or by the `wait` after a save in the background.
    """

    def __init__(self, save_dir: Path, keep_last: int | None, group):
        self.save_dir, self.keep_last, self.group = save_dir, keep_last, group
        self.blocked_seconds = self.total_seconds = 0.0  # of the last save
        self._thread, self._error, self._newest = None, None, None

    def save(
        self, name: str, pieces: list[Piece], state: dict, links: tuple[str, ...], in_background: bool = False
    ) -> None:
        """Saves the pieces as `<save_dir>/<name>` and points `links` at it. In the background, training may go on at once."""
        began = time.perf_counter()
        self.wait()
        rng = rng_state()
        if in_background:
            pieces = [Piece(p.name, p.shape, p.box, _host_copy(p.data)) for p in pieces]
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies are complete before training changes what they copy
            self._thread = threading.Thread(
                target=self._run, args=(name, pieces, state, rng, links, began), name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(name, pieces, state, rng, links, began)
        self.blocked_seconds = time.perf_counter() - began

    def wait(self) -> None:
        """Returns once the last save is on disk; raises what went wrong with it."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether `wait` will raise."""
        return self._error is not None

    def prune(self) -> None:
        """Removes what `keep_last` does not keep, once the last save has proved good; not while one is under way."""
        if self._newest and self.keep_last is not None and not self.busy:
            _prune(self.save_dir, self.keep_last, self._newest)
            self._newest = None

    def _run(self, *args) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # raised again by wait(), in the thread that trains
            self._error = error

    def _write(self, name, pieces, state, rng, links, began) -> None:
        rank, world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        temporary = self.save_dir / f".saving-{name}"

        def prepare():
            self.save_dir.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

        def write():
            file = f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
            specs = {piece.name: (piece.data.dtype, tuple(piece.data.shape)) for piece in pieces}
            boxes = json.dumps({piece.name: (piece.shape, piece.box.offsets) for piece in pieces})
            with TensorFileWriter(
                temporary / file, specs, {"boxes": boxes, "rng": rng}, checksums="file"
            ) as writer:
                for piece in pieces:
                    writer.add(piece.name, piece.data)
                return file, writer.finish()

        try:
            self._together(prepare if rank == 0 else None, name)
            files = dict(self._together(write, name))
            self._together(
                (lambda: self._publish(name, temporary, files, state, links)) if rank == 0 else None, name
            )
        except TrainingFailed:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.total_seconds = time.perf_counter() - began

    def _publish(self, name: str, temporary: Path, files: dict, state: dict, links: tuple[str, ...]) -> None:
        """Everything is on disk but the names: from here on, each step leaves a whole checkpoint behind."""
        body = json.loads(
            json.dumps({"state": state, "files": files})
        )  # as it will be read: keys are strings
        _write_json(temporary / MANIFEST, {**body, "checksum": _digest(body)})
        _fsync_folder(temporary)
        final, replaced = self.save_dir / name, self.save_dir / f".replaced-{name}"
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
        _fsync_folder(self.save_dir)
        for link in links:
            _swap_link(self.save_dir, link, name)
        _fsync_folder(self.save_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        self._newest = final

    def _together(self, action: Callable | None, name: str) -> list:
        """Runs the action on the ranks that have one, and gives every result to all; one rank's failure is everybody's."""
        result, problem = None, None
        try:
            result = action() if action else None
        except OSError as error:
            problem = (
                f"checkpoint {self.save_dir / name} could not be saved: {error.strerror or error} ({error.filename or 'while writing'}). "
                "The checkpoints before it are untouched; make room or choose another --save_dir, then --resume_from=last"
            )
        answers = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(answers, (result, problem), group=self.group)
        if problems := [problem for _, problem in answers if problem]:
            raise TrainingFailed(problems[0])
        return [result for result, _ in answers]


def _host_copy(data: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return copy.copy_(data.detach(), non_blocking=True)


def _swap_link(save_dir: Path, link: str, target: str) -> None:
    temporary = save_dir / f".{link}.new"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if (save_dir / link).is_dir() and not (save_dir / link).is_symlink():
        os.rename(save_dir / link, save_dir / f"{link}-of-nnscaler-{time.time_ns()}")  # its folder of links
    os.replace(temporary, save_dir / link)


def _prune(save_dir: Path, keep: int, newest: Path) -> None:
    """Keeps `keep` checkpoints from `newest` back; later ones are another run's, and left alone."""
    kept = {(save_dir / link).resolve() for link in ("last", "best")}
    for path in [path for path in checkpoints(save_dir) if _step(path) <= _step(newest)][keep:]:
        if path.resolve() not in kept:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = save_dir / f".replaced-{path.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clean_up(save_dir: Path) -> None:
    """Removes what a killed save left behind. A checkpoint set aside by a save that died before putting the new one is put back."""
    for link in ("last", "best"):
        (save_dir / f".{link}.new").unlink(missing_ok=True)
    for path in save_dir.glob(".*-*") if save_dir.is_dir() else []:
        if not _TEMPORARY.fullmatch(path.name):
            continue
        kind, name = path.name[1:].split("-", 1)
        if kind == "replaced" and (path / MANIFEST).is_file() and not (save_dir / name).exists():
            try:
                read_manifest(path)
                os.rename(path, save_dir / name)
                continue
            except CheckpointError:
                pass
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Renames a folder to the first free numbered name beside it, and says so; ValueError where that would pull away what is in use."""
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(
            f"{folder} holds another run, and cannot be set aside from inside it: choose another --save_dir and --log_dir"
        )
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
    target = folder.with_name(f"{folder.name}.{number}")
    os.rename(folder, target)
    logger.warning("%s holds another run: set aside as %s", folder, target)
    return target


def merge(source: str | Path, out_file: str | Path) -> Path:
    """Merges a checkpoint folder into one safetensors file, a few rows at a time; raises CheckpointError if it is damaged.

    What is written is what `state` and every tensor hold, each tensor with its checksum: one portable file.
    """
    if foreign.is_shards(Path(source)):
        with temporary_sibling(Path(out_file)) as temporary:
            foreign.merge(Path(source), temporary)
        return Path(out_file)
    checkpoint, out_file = Checkpoint.open(source), Path(out_file)
    placeholders = json.dumps({name: f"{index:032x}" for index, name in enumerate(checkpoint.tensors)})
    metadata = {
        "state": json.dumps(checkpoint.state),
        "state_digest": _digest(checkpoint.state),
        "digests": placeholders,
    }
    with (
        temporary_sibling(out_file) as temporary,
        TensorFileWriter(temporary, checkpoint.tensors, metadata, "tensors") as writer,
    ):
        checkpoint.hash_what_is_read()
        try:
            for name in checkpoint.tensors:
                writer.add_in_parts(name, checkpoint.read_in_parts(name))
        except (ValueError, TypeError):  # of a damaged header: the checksum says which file's
            checkpoint.verify()
            raise
        checkpoint.verify()
        # Inside the header both are JSON texts in a JSON text.
        writer.replace_in_header(json.dumps(placeholders)[1:-1], json.dumps(json.dumps(writer.digests))[1:-1])
        writer.finish()
    return out_file


@contextlib.contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes it when the block ends well, and is removed when it does not. OSError: `path` cannot be written."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)  # rather than the temporary one's
        raise
    finally:
        with contextlib.suppress(OSError):  # the folder may not allow it, or not be one
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- random number generators


def rng_state() -> str:
    """Python's, NumPy's, torch's and the device's generators, as JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if torch.cuda.is_available():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return json.dumps(state)


def set_rng_state(text: str) -> None:
    state = json.loads(text)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))

    def tensor(encoded):
        return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
    elif torch.cuda.is_available():
        warnings.warn(
            "the checkpoint was saved without CUDA: the device's random numbers start from the seed",
            stacklevel=2,
        )
