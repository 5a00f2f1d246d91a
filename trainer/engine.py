"""Picks nnScaler's Trainer where it can run, else ours, and says why; reads either one's checkpoints."""

import importlib.metadata
import importlib.util
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from trainer import ranks
from trainer.checkpoint import Checkpoint, CheckpointError, candidates, checkpoints
from trainer.nnscaler_engine.files import NnScalerCheckpoint, is_nnscaler

logger = logging.getLogger(__name__)

TRANSFORMERS_VERSION = "4.48"  # nnScaler cannot trace the modelling code of later versions
INSTALLATION = "https://nnscaler.readthedocs.io/en/latest/installation.html"


def choose(engine: str, adapter: bool = False, partition: str = "") -> str:
    """Turns --engine into 'nnscaler' or 'native' and logs the reason; ValueError if nnScaler cannot run.

    adapter: an adapter is trained, and not the whole model. partition: the flags that only nnScaler knows.
    """
    missing = None if engine == "native" else _missing_for_nnscaler(adapter)
    if engine == "nnscaler" and missing:
        raise ValueError(f"--engine=nnscaler: {missing}, or use --engine=native")
    name = "native" if engine == "native" or missing else "nnscaler"
    found = missing.split(":")[0] if missing else "nnScaler and CUDA are there"
    logger.info("engine: %s (%s)", name, found if engine == "auto" else f"--engine={engine}")
    if name == "native" and partition:
        why = "only nnScaler partitions a model, our engine shards it over all ranks"
        raise ValueError(f"{partition}: {why}: leave it out, or use --engine=nnscaler")
    return name


def _missing_for_nnscaler(adapter: bool) -> str | None:
    """What nnScaler lacks here, and the fix."""
    if adapter:
        return "nnScaler trains no adapters: leave --lora_rank out"
    if importlib.util.find_spec("nnscaler") is None:
        return f"nnScaler is not installed: see {INSTALLATION} (release 0.8, with requirements-nnscaler.txt)"
    found = importlib.metadata.version("transformers")
    if not f"{found}.".startswith(f"{TRANSFORMERS_VERSION}."):
        fix = "pip install -r requirements-nnscaler.txt"
        return f"nnScaler runs with transformers {TRANSFORMERS_VERSION}, not {found}: {fix}"
    if torch.cuda.device_count() == 0:
        return "nnScaler needs CUDA, and there is no CUDA device: run where torch finds one"
    return None


def trainer_class(engine: str) -> type:
    """The Trainer of 'nnscaler' or 'native'."""
    if engine == "nnscaler":
        from trainer.nnscaler_engine.trainer import Trainer
    else:
        from trainer.trainer import Trainer
    return Trainer


def open_checkpoint(path: Path):
    """Opens a checkpoint of either engine; raises CheckpointError.

    The result has `path`, `state`, `verify()`, `merge(out_file)`, `shapes` (parameter name -> shape) and
    `parameters()` (names and tensors, one at a time).
    """
    if not path.exists():
        fix = "train first, or name a merged file or folder (--output_path is where a result goes)"
        if found := checkpoints(path.parent):
            fix = f"name one that is there, such as {found[0]}"
        raise CheckpointError(f"there is no checkpoint {path}: {fix}")
    if found := checkpoints(path):
        fix = f"name one of them, such as {found[0]}, or 'last' with --save_dir={path}"
        raise CheckpointError(f"{path} is a folder of checkpoints: {fix}")
    if (path / "config.json").exists():
        raise CheckpointError(f"{path} is a model, no checkpoint: --model_id={path} starts from it")
    return NnScalerCheckpoint(path) if is_nnscaler(path) else Checkpoint.open(path)


def open_resumed(wanted: str | None, save_dir: str, engine: str):
    """The checkpoint to resume from, chosen by rank 0 and verified by all ranks; None: a fresh start.

    wanted: 'last', which falls back to the newest good one, 'best', or a path. Raises CheckpointError if
    there is none (a fresh start if save_dir holds none at all), if all are damaged, or if the other engine
    wrote it. Needs a process group, whose ranks all call this.
    """
    problem = None
    for path in ranks.by_first_rank(_resume_paths, wanted, Path(save_dir), engine):
        if problem and dist.get_rank() == 0:
            logger.warning("WARNING: %s. Falling back to %s", problem, path)
        try:
            return ranks.together(_open_verified, path)
        except CheckpointError as error:
            problem = error
    if problem:
        raise problem
    return None


def _resume_paths(wanted: str | None, save_dir: Path, engine: str) -> list[Path]:
    paths = [Path(wanted)] if wanted else []
    if wanted in ("last", "best"):
        link = save_dir / wanted
        paths = [link] if is_nnscaler(link) else candidates(save_dir, wanted)
        if not paths:
            logger.warning("resume_from: there is no '%s' checkpoint in %s: a fresh start", wanted, save_dir)
        elif not link.exists():
            paths.insert(0, link)  # it is refused with a reason
    for path in paths:
        if path.exists() and is_nnscaler(path) != (engine == "nnscaler"):
            fix = "resume with that engine, or start from its weights (--export_hf, then --model_id)"
            raise CheckpointError(f"the other engine wrote {path}, not --engine={engine}: {fix}")
    return paths


def _open_verified(path: Path):
    source = open_checkpoint(path)
    if isinstance(source, Checkpoint):
        source.verify(dist.get_rank(), dist.get_world_size())
    return source
