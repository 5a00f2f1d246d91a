"""Sets up a run of our Trainer: the model with its weights, the optimizer's state, the random state."""

import contextlib
import ctypes
import json
import logging
import math
import os
import random

import numpy as np
import torch
import torch.distributed as dist

from trainer import parallel, ranks
from trainer.args import NativeOptions, TrainerArgs
from trainer.checkpoint import Checkpoint, CheckpointError, json_digest
from trainer.tensorfile import Box
from trainer.trainable import TrainableModel

logger = logging.getLogger(__name__)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds Python, NumPy and torch; `deterministic` also makes CUDA's kernels deterministic."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees for the next one, which else asks the system for zeroed pages."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


def build_model(
    args: TrainerArgs, options: NativeOptions, device: torch.device, resumed: Checkpoint | None
) -> tuple[TrainableModel, dict[torch.nn.Parameter, str]]:
    """The sharded model, and the name of each parameter in checkpoints."""
    model = args.model.type(**args.model.args)
    layout = options.layout
    parallel.parallelize(
        model,
        device,
        args.precision,
        layout.recompute,
        layout.compile,
        layout.dp_replicate,
        layout.reshard_after_forward,
    )
    return model, ranks.together(fill_weights, model, resumed)


def frozen_digest(model: TrainableModel, resumed: Checkpoint | None) -> str | None:
    """The checksum of the weights that the model reads from files and does not train; None: it trains all.

    Each rank reads its part of them. Raises CheckpointError if the checkpoint was trained on other weights.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = ranks.gathered(ranks.together(lambda: pretrained(model).digests(rank, world_size)))
    digest = json_digest({name: digest for part in parts for name, digest in part.items()})
    if resumed:
        resumed.check_frozen(digest)
    return digest


def pretrained(model: TrainableModel) -> Checkpoint | None:
    """The model's weight files opened; None: it has none."""
    files = model.weight_files()
    return Checkpoint.of_weights(files) if files else None


@torch.no_grad()
def fill_weights(model: TrainableModel, resumed: Checkpoint | None = None) -> dict[torch.nn.Parameter, str]:
    """Fills the parameters, and returns the name in checkpoints of each that is trained.

    These come from the checkpoint, and frozen ones from the model's weight_files(). Without a checkpoint all
    come from the files, but what is trained beside frozen ones, or without files, from initial_values().
    Raises CheckpointError for a tensor that is missing, that the model lacks, or that has another shape.
    """
    trained, frozen = {}, {}
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[parameter] = model.checkpoint_name(name)
    base = pretrained(model) if frozen or not resumed else None
    if frozen:
        _fill(model, frozen, base)
        base = None
    _fill(model, trained, *((resumed, "model.") if resumed else (base,)))
    return trained


def _fill(model: TrainableModel, names: dict, source: Checkpoint | None, prefix: str = "") -> None:
    tensors = source.tensors if source else {}
    held = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    if surplus := sorted(held - set(names.values())):
        raise CheckpointError(
            f"{source.path} holds {surplus[0]}, which this model lacks ({len(surplus)} such tensors)",
            "Give the flags of its model, or none",
        )
    for parameter, name in names.items():
        box, out = parallel.local_box(parameter), parallel.local(parameter)
        if source:
            source.read(prefix + name, box, out, tuple(parameter.shape))
        elif box.size:
            _fill_fresh(model, name, parameter.shape, box, out)


def _fill_fresh(model: TrainableModel, name: str, shape: torch.Size, box: Box, out: torch.Tensor) -> None:
    """Fill a box of a fresh parameter, which must be a run of whole rows, as FSDP's are."""
    if box.shape[1:] != tuple(shape[1:]):
        raise ValueError(f"the shard {box.shape} of {name} {tuple(shape)} is not a run of whole rows")
    start = box.offsets[0] * math.prod(shape[1:])
    values = model.initial_values(name, start, start + box.size)
    if values is not None:
        out.copy_(values.view(box.shape))


@torch.no_grad()
def restore_optimizer(source: Checkpoint, optimizer, names: dict, updates: int) -> None:
    """Reads this rank's part of the optimizer's state, which was saved after so many updates."""
    keys = sorted({name.rsplit(".", 1)[1] for name in source.tensors if name.startswith("optimizer.")})
    for parameter, name in names.items() if updates else []:
        state = optimizer.state[parameter]
        for key in keys:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            box, out = parallel.local_box(parameter), parallel.local(state[key])
            source.read(f"optimizer.{name}.{key}", box, out)
        # Optimizers keep the step beside the parameter if they are fused, else on the CPU.
        fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.tensor(float(updates), device=parameter.device if fused else "cpu")


def rng_state() -> str:
    """The state of Python's, NumPy's, torch's and the device's random number generators, as JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    state["torch"] = torch.get_rng_state().tolist()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return json.dumps(state)


def set_rng_state(text: str) -> None:
    """Restores what `rng_state` returned."""
    state = json.loads(text)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    elif torch.cuda.is_available():
        logger.warning("a CPU saved the checkpoint: CUDA's random numbers start from the seed")
