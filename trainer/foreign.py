"""Checkpoints that nnScaler's Trainer wrote: its merged file read as ours, its shards told apart and merged by it."""

import json
from pathlib import Path

import torch

from trainer.tensorfile import Box

STATE_FILE = "state.json"  # beside nnScaler's shards: what our checkpoints call `state`


def is_shards(path: Path) -> bool:
    """Whether the folder holds nnScaler's shards, one file a rank (or, as `last` and `best` do, links to them)."""
    return (path / "0.ckpt").exists()


def is_merged(path: Path) -> bool:
    """Whether the file is a zip archive, as torch.save writes them."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def shards_state(path: Path) -> dict:
    """The state beside the shards; raises FileNotFoundError where there is none."""
    return json.loads(((path / "0.ckpt").resolve().parent / STATE_FILE).read_text())


def merge(folder: Path, out_file: Path) -> None:
    """nnScaler's own merging, which needs memory for the whole model and optimizer. ValueError: nnScaler is not installed."""
    try:
        from nnscaler.cli.trainer import Trainer
    except ImportError:
        raise ValueError(
            f"{folder} holds nnScaler's shards, which only nnScaler merges: install it (requirements-nnscaler.txt)"
        ) from None
    files = sorted(folder.glob("[0-9]*.ckpt"), key=lambda path: int(path.stem))
    Trainer.merge_checkpoint([str(file) for file in files], str(out_file))


class MergedFile:
    """A merged file, mapped into memory: `tensors` under our names, and `state` as our checkpoints have it.

    Raises ValueError if it is none. Master weights are taken where the training kept them apart from the parameters.
    """

    def __init__(self, path: Path):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            weights, optimizer, status, args = (
                content[key] for key in ("model", "optimizer", "train_status", "train_args")
            )
            per_parameter, step = optimizer["state"], status["finished_train_steps"]
        except Exception as error:  # torch.load raises all sorts of them
            raise ValueError(f"{path} is no merged checkpoint: {str(error).splitlines()[0]}") from None
        prefix = next(iter(weights)).split(".")[0] + "."
        if not all(name.startswith(prefix) for name in weights):
            prefix = ""  # the module was not wrapped
        self.tensors: dict[str, torch.Tensor] = {}
        seen = set()
        for name, weight in weights.items():
            if (place := (weight.untyped_storage().data_ptr(), weight.storage_offset())) in seen:
                continue  # tied to one before: the optimizer numbers it once
            state = per_parameter[len(seen)]
            seen.add(place)
            name = name.removeprefix(prefix)
            self.tensors[f"model.{name}"] = state.get("fp32_params", weight)
            for key in ("exp_avg", "exp_avg_sq"):
                self.tensors[f"optimizer.{name}.{key}"] = state[key]
        samples = step * args["global_batch_size"]
        counts = {"step": step, "samples": samples, "updates": step}
        derived = {
            "epoch": 0,
            "step": step,
            "samples": samples,
            "world_size": len(content.get("rng_states", [None])),
            "config": args,
        }
        derived |= {
            "global_batch_size": args["global_batch_size"],
            "seed": args["seed"],
            "train_state": counts,
        }
        self.state: dict = json.loads(content["trainer_state"][0]) if "trainer_state" in content else derived

    def read(self, name: str, box: Box, out: torch.Tensor) -> torch.Tensor:
        """A box of the tensor, put into `out`, which is in fp32."""
        return out.copy_(self.tensors[name][box.slices])
