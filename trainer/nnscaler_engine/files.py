"""nnScaler's checkpoint files: tells them from ours, merges shards, and reads the weights of a merged file.

Only merging needs nnScaler itself. Merged files are pickles: torch.load reads them with weights_only.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.checkpoint import NAME_A_CHECKPOINT, CheckpointError, temporary_sibling

STATE_FILE = "state.json"  # beside nnScaler's shards: what our checkpoints call `state`


def is_nnscaler(path: Path) -> bool:
    """Is it a folder of nnScaler's shards (`last` has links to them), or a file that torch.save wrote?"""
    if not path.is_file():
        return (path / "0.ckpt").exists()
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


class NnScalerCheckpoint:
    """A folder of nnScaler's shards, or a merged file. Raises CheckpointError if the file is none.

    state: what our checkpoints call so; empty if another script wrote the checkpoint.
    """

    def __init__(self, path: str | Path):
        self.path, self.state, self._weights = Path(path).resolve(), {}, None
        if self.path.is_file():
            self._weights, self.state = read_merged(self.path)
        elif (beside := (self.path / "0.ckpt").resolve().with_name(STATE_FILE)).is_file():
            self.state = json.loads(beside.read_text())

    def verify(self) -> None:
        """Maps the weights into memory; raises CheckpointError if that fails. There are no checksums."""
        if self._weights is None:
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".merging-") as folder:
                self._weights, _ = read_merged(self.merge(Path(folder, "merged.ckpt")))

    def merge(self, out_file: Path) -> Path:
        """Lets nnScaler merge the shards, in memory for the whole model and optimizer."""
        try:
            from nnscaler.cli import Trainer
        except ImportError:
            raise CheckpointError(f"only nnScaler merges the shards in {self.path}", "Install it") from None
        files = sorted(self.path.glob("[0-9]*.ckpt"), key=lambda path: int(path.stem))
        if not files:
            raise CheckpointError(f"{self.path} is merged already", "Use it as it is")
        if out_file.exists() and not is_nnscaler(out_file):
            raise CheckpointError(
                f"{out_file} exists and is not a merged checkpoint", "Give another --output_path"
            )
        with temporary_sibling(out_file) as temporary:
            Trainer.merge_checkpoint([str(file) for file in files], str(temporary))
        return out_file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.parameters()}

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every model parameter: the fp32 master weights if the training kept some."""
        self.verify()
        yield from self._weights.items()


def read_merged(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(weights by Hugging Face name, state) of a merged file, mapped into memory; raises CheckpointError."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights, per_parameter = content["model"], content["optimizer"]["state"]
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is not a merged checkpoint: {reason}", NAME_A_CHECKPOINT) from None
    prefix = next(iter(weights)).split(".")[0] + "."
    prefix *= all(name.startswith(prefix) for name in weights)  # else the module was not wrapped
    found, seen = {}, set()
    for name, weight in weights.items():
        place = (weight.untyped_storage().data_ptr(), weight.storage_offset())
        if place not in seen:  # else it is tied to an earlier parameter, and the optimizer counts it once
            found[name.removeprefix(prefix)] = per_parameter[len(seen)].get("fp32_params", weight)
            seen.add(place)
    return found, json.loads(content["trainer_state"][0]) if "trainer_state" in content else {}
