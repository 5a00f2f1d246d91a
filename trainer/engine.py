"""Picks nnScaler's Trainer where it can run, else ours, and says why; reads either one's checkpoints."""

import importlib.metadata
import importlib.util
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from errors import UserError
from trainer import ranks
from trainer.checkpoint import Checkpoint, CheckpointError, candidates, checkpoints
from trainer.nnscaler_engine.files import NnScalerCheckpoint, is_nnscaler

logger = logging.getLogger(__name__)

TRANSFORMERS_VERSION = "4.48"  # nnScaler cannot trace the modelling code of later versions
INSTALLATION = "https://nnscaler.readthedocs.io/en/latest/installation.html"


def choose(engine: str, adapter: bool = False, partition: str = "") -> str:
    """Turns --engine into 'nnscaler' or 'native' and logs the reason; UserError if nnScaler cannot run.

    adapter: an adapter is trained, and not the whole model. partition: the flags that only nnScaler knows.
    """
    missing = None if engine == "native" else _missing_for_nnscaler(adapter)
    if engine == "nnscaler" and missing:
        raise UserError(
            f"--engine=nnscaler cannot run: {missing.problem}", f"{missing.fix}, or use --engine=native"
        )
    name = "native" if engine == "native" or missing else "nnscaler"
    reason = f"--engine={engine}"
    if engine == "auto":
        reason = missing.problem if missing else "nnScaler and CUDA are there"
    logger.info("engine: %s (%s)", name, reason)
    if name == "native" and partition:
        raise UserError(
            f"{partition} needs nnScaler: our engine does not partition a model, it shards it",
            "Leave it out, or use --engine=nnscaler",
        )
    return name


def _missing_for_nnscaler(adapter: bool) -> UserError | None:
    """Return why nnScaler cannot run, with the fix; None: it can."""
    if adapter:
        return UserError("nnScaler trains no adapters", "Leave --lora_rank out")
    if importlib.util.find_spec("nnscaler") is None:
        return UserError(
            "nnScaler is not installed",
            f"Install release 0.8 with requirements-nnscaler.txt ({INSTALLATION})",
        )
    version = importlib.metadata.version("transformers")
    if not f"{version}.".startswith(f"{TRANSFORMERS_VERSION}."):
        return UserError(
            f"nnScaler runs with transformers {TRANSFORMERS_VERSION}, not {version}",
            "Run `pip install -r requirements-nnscaler.txt`",
        )
    if torch.cuda.device_count() == 0:
        return UserError("nnScaler needs CUDA, and there is no CUDA device", "Run where torch finds one")
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
        fix = "Train first, or name a merged file or folder (--output_path is where a result goes)"
        siblings = checkpoints(path.parent)
        if siblings:
            fix = f"Name one that is there, such as {siblings[0]}"
        raise CheckpointError(f"there is no checkpoint {path}", fix)
    inside = checkpoints(path)
    if inside:
        raise CheckpointError(
            f"{path} is a folder of checkpoints",
            f"Name one of them, such as {inside[0]}, or 'last' with --save_dir={path}",
        )
    if (path / "config.json").exists():
        raise CheckpointError(f"{path} is a model, not a checkpoint", f"Start from it with --model_id={path}")
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
            logger.warning("%s. Falling back to %s", problem.problem, path)
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
            raise CheckpointError(
                f"the other engine wrote {path}, not --engine={engine}",
                "Resume with that engine, or start from its weights (--export_hf, then --model_id)",
            )
    return paths


def _open_verified(path: Path):
    source = open_checkpoint(path)
    if isinstance(source, Checkpoint):
        source.verify(dist.get_rank(), dist.get_world_size())
    return source
