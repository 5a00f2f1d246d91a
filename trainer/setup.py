"""Sets up a run of our Trainer: process group, signals, the model with its weights, resume, random state."""

import base64
import contextlib
import json
import logging
import math
import os
import random
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer import parallel
from trainer.args import NativeOptions, TrainerArgs, load_type
from trainer.checkpoint import Checkpoint, CheckpointError, candidates
from trainer.tensorfile import Box, TensorFileReader

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def process_group(device: torch.device):
    """Joins the process group of torchrun's ranks, or makes one of a single rank; uses the caller's if there is one."""
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
            # After a restart, torchrun's store still holds the addresses of the ranks that died: use new keys. On
            # several nodes the restart counts may differ; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps there.
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
        for number, handler in before.items():
            signal.signal(number, handler)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds Python, NumPy and torch; `deterministic` also makes CUDA's kernels deterministic."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- model


def build_model(
    args: TrainerArgs, options: NativeOptions, device: torch.device, source: Checkpoint | None
) -> tuple[torch.nn.Module, dict[torch.nn.Parameter, str]]:
    """The sharded model with its weights, and the name of each parameter in checkpoints.

    The weights come from `source`, else from the model's weight_files(), else from its initial_values().
    """
    model = load_type(args.model.type)(**args.model.args)
    mesh = parallel.build_mesh(device)
    parallel.parallelize(model, mesh, args.precision, options.recompute, options.compile)
    parallel.materialize(model, device)
    names = parameter_names(model)
    if source:
        parallel.fill(names, _from_checkpoint(source))
    else:
        fill_initial(model, names)
    return model, names


def parameter_names(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """The name of each parameter in checkpoints; tied parameters come once."""
    prefix = getattr(model, "name_prefix", "")
    return {parameter: name.removeprefix(prefix) for name, parameter in model.named_parameters()}


def fill_initial(model: torch.nn.Module, names: dict[torch.nn.Parameter, str]) -> None:
    """Fills the parameters from the model's weight_files(), else from its initial_values()."""
    if files := (model.weight_files() if hasattr(model, "weight_files") else None):
        parallel.fill(names, _from_files(files))
    elif hasattr(model, "initial_values"):
        parallel.fill(names, _from_scratch(model))


def _from_checkpoint(source: Checkpoint):
    def put(out: torch.Tensor, name: str, shape: tuple[int, ...], box: Box) -> None:
        name = f"model.{name}"
        if name in source.tensors and source.tensors[name][1] != shape:
            raise CheckpointError(
                f"{source.path}: {name} has shape {source.tensors[name][1]}, this model's is {shape}: "
                "give the same model flags"
            )
        source.read(name, box, out)

    return put


def _from_files(files: dict[str, Path]):
    readers = {path: TensorFileReader(path) for path in set(files.values())}

    def put(out: torch.Tensor, name: str, shape: tuple[int, ...], box: Box) -> None:
        if name not in files:
            raise ValueError(f"the pretrained weights hold no parameter {name}: they belong to another model")
        reader = readers[files[name]]
        found = reader.tensors[name][1]
        if found != shape:
            raise ValueError(
                f"{reader.path}: {name} has shape {found}, the model's configuration says {shape}"
            )
        out.copy_(reader.read(name, box))

    return put


def _from_scratch(model):
    def put(out: torch.Tensor, name: str, shape: tuple[int, ...], box: Box) -> None:
        start = box.offsets[0] * math.prod(shape[1:])  # FSDP's boxes are runs of whole rows
        out.copy_(model.initial_values(name, start, start + box.size).view(box.shape))

    return put


# ---------------------------------------------------------------- resume


def open_resumed(args: TrainerArgs, control) -> Checkpoint | None:
    """The checkpoint to resume from, verified by all ranks together; None: a fresh start.

    'last' falls back to the newest good checkpoint with a warning. control: a gloo group of all ranks.
    """
    path = args.checkpoint.get_resume_checkpoint()
    if path is None:
        return None
    paths, first = [path], dist.get_rank() == 0
    if path.name in ("last", "best") and path.parent == Path(args.checkpoint.save_dir):
        paths = candidates(path.parent, path.name)
        if paths and not path.exists() and first:
            logger.warning("WARNING: %s names no checkpoint. Falling back to %s", path, paths[0])
    for path, next_path in zip(paths, [*paths[1:], None], strict=True):
        source, problem = _open_verified(path, control)
        if problem is None:
            return source
        if next_path is None:
            raise CheckpointError(problem)
        if first:
            logger.warning("WARNING: %s. Falling back to %s", problem, next_path)
    return None


def _open_verified(path: Path, control) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint, of which each rank has verified its share, and the first problem that any rank found."""
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
def restore_optimizer(
    source: Checkpoint, optimizer, names: dict[torch.nn.Parameter, str], updates: int
) -> None:
    """Reads this rank's part of the optimizer's state, which was saved after so many updates."""
    keys = sorted({name.rsplit(".", 1)[1] for name in source.tensors if name.startswith("optimizer.")})
    for parameter, name in names.items() if updates else []:
        state = optimizer.state[parameter]
        for key in keys:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            source.read(
                f"optimizer.{name}.{key}", parallel.local_box(parameter), out=parallel.local(state[key])
            )
        # Optimizers keep the step beside the parameter if they are fused, else on the CPU.
        fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.tensor(
            float(updates), device=parallel.local(parameter).device if fused else "cpu"
        )


# ---------------------------------------------------------------- random state


def rng_state() -> str:
    """The state of Python's, NumPy's, torch's and the device's random number generators, as JSON."""
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
    """Restores what `rng_state` returned."""
    state = json.loads(text)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))

    def tensor(encoded: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
    elif torch.cuda.is_available():
        warnings.warn(
            "the checkpoint was saved without CUDA: CUDA's random numbers start from the seed", stacklevel=2
        )
