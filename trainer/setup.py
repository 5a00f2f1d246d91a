"""Sets up a run of our Trainer: process group, signals, the model with its weights, resume, random state."""

import contextlib
import json
import logging
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer import parallel
from trainer.args import NativeOptions, TrainerArgs
from trainer.checkpoint import Checkpoint, CheckpointError, candidates

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def process_group(device: torch.device):
    """Joins torchrun's process group, or makes one of a single rank; keeps the caller's if there is one."""
    if dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # After a restart, torchrun's store still holds the addresses of the ranks that died: use new
            # keys. Nodes may count restarts differently: there, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def noted_signals():
    """Yields {SIGTERM: arrived?, SIGUSR1: arrived?}. All ranks act on them together, after the step."""
    arrived = {signal.SIGTERM: False, signal.SIGUSR1: False}

    def note(number, frame):
        arrived[number] = True

    before = {number: signal.signal(number, note) for number in arrived}
    try:
        yield arrived
    finally:
        for number in before:
            signal.signal(number, before[number])


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds Python, NumPy and torch; `deterministic` also makes CUDA's kernels deterministic."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_model(
    args: TrainerArgs, options: NativeOptions, device: torch.device, resumed: Checkpoint | None
) -> tuple[torch.nn.Module, dict[torch.nn.Parameter, str]]:
    """The sharded model, and the name of each parameter in checkpoints."""
    model = args.model.type(**args.model.args)
    parallel.parallelize(model, device, args.precision, options.recompute, options.compile)
    return model, fill_weights(model, resumed)


@torch.no_grad()
def fill_weights(model: torch.nn.Module, resumed: Checkpoint | None = None) -> dict[torch.nn.Parameter, str]:
    """Fills the parameters, and returns the name of each in checkpoints.

    Weights come from the checkpoint, else from the model's weight_files(), else from initial_values().
    """
    prefix = getattr(model, "name_prefix", "")
    names = {parameter: name.removeprefix(prefix) for name, parameter in model.named_parameters()}
    files = model.weight_files() if hasattr(model, "weight_files") and not resumed else None
    source = Checkpoint.of_weights(files) if files else resumed
    for parameter, name in names.items():
        box, out = parallel.local_box(parameter), parallel.local(parameter)
        if source:
            source.read(f"model.{name}" if resumed else name, box, out, tuple(parameter.shape))
        elif hasattr(model, "initial_values") and box.size:
            start = box.offsets[0] * math.prod(parameter.shape[1:])  # FSDP's boxes are runs of whole rows
            out.copy_(model.initial_values(name, start, start + box.size).view(box.shape))
    return names


def open_resumed(args: TrainerArgs, control) -> Checkpoint | None:
    """The checkpoint to resume from, verified by all ranks together; None: a fresh start.

    'last' falls back to the newest good one. control: a gloo group of all ranks.
    """
    wanted, save_dir = args.checkpoint.resume_from, Path(args.checkpoint.save_dir)
    named = str(wanted) in ("last", "best")
    paths = candidates(save_dir, str(wanted)) if named else [Path(wanted)] if wanted else []
    missing = named and not (save_dir / wanted).exists()
    problem = f"{save_dir / wanted} names no checkpoint" if missing else None
    for path in paths:
        if problem and dist.get_rank() == 0:
            logger.warning("WARNING: %s. Falling back to %s", problem, path)
        source, problem = _open_verified(path, control)
        if problem is None:
            return source
    if paths:
        raise CheckpointError(problem)
    if named and dist.get_rank() == 0:
        logger.warning("resume_from: there is no '%s' checkpoint in %s: a fresh start", wanted, save_dir)
    return None


def _open_verified(path: Path, control) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint, of which each rank verified its share, and the first problem that a rank found."""
    source, problem = None, None
    try:
        source = Checkpoint.open(path)
        source.verify(dist.get_rank(), dist.get_world_size())
    except CheckpointError as error:
        problem = str(error)
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control)
    return source, next((problem for problem in problems if problem), None)


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
        logger.warning("WARNING: a CPU saved the checkpoint: CUDA's random numbers start from the seed")
