"""Picks nnScaler's Trainer where it can run, else ours, and says why; reads either one's checkpoints."""

import importlib.metadata
import importlib.util
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

TRANSFORMERS_VERSION = "4.48"  # nnScaler cannot trace the modelling code of later versions
INSTALLATION = "https://nnscaler.readthedocs.io/en/latest/installation.html"


def choose(engine: str) -> str:
    """Turns --engine into 'nnscaler' or 'native' and logs the reason; ValueError if nnScaler cannot run."""
    missing = None if engine == "native" else _missing_for_nnscaler()
    if engine == "nnscaler" and missing:
        raise ValueError(f"--engine=nnscaler: {missing}, or use --engine=native")
    name = "native" if engine == "native" or missing else "nnscaler"
    found = missing.split(":")[0] if missing else "nnScaler and CUDA are there"
    logger.info("engine: %s (%s)", name, found if engine == "auto" else f"--engine={engine}")
    return name


def _missing_for_nnscaler() -> str | None:
    """What nnScaler lacks here, and the fix."""
    if importlib.util.find_spec("nnscaler") is None:
        return f"nnScaler is not installed: see {INSTALLATION} (release 0.8, with requirements-nnscaler.txt)"
    found = importlib.metadata.version("transformers")
    if not f"{found}.".startswith(f"{TRANSFORMERS_VERSION}."):
        fix = "pip install -r requirements-nnscaler.txt"
        return f"nnScaler runs with transformers {TRANSFORMERS_VERSION}, not {found}: {fix}"
    import torch

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
    from trainer.checkpoint import Checkpoint, CheckpointError
    from trainer.nnscaler_engine.files import NnScalerCheckpoint, is_nnscaler

    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: train first, or name a merged file or folder")
    return NnScalerCheckpoint(path) if is_nnscaler(path) else Checkpoint.open(path)


def resume_state(resume_from: str | None, save_dir: str, engine: str) -> dict | None:
    """The state of the checkpoint to resume from; None if there is none, or no 'last' or 'best'.

    Raises ValueError if all are damaged, or if the other engine wrote them. Starts no process group.
    """
    from trainer.checkpoint import CheckpointError, candidates
    from trainer.nnscaler_engine.files import is_nnscaler

    paths, problem = [Path(resume_from)] if resume_from else [], None
    if resume_from in ("last", "best"):
        link = Path(save_dir, resume_from)
        paths = [link] if is_nnscaler(link) else candidates(Path(save_dir), resume_from)
    for path in paths:
        if path.exists() and is_nnscaler(path) != (engine == "nnscaler"):
            fix = "resume with that engine, or start from its weights (--export_hf, then --model_id)"
            raise ValueError(f"the other engine wrote {path}, not --engine={engine}: {fix}")
        try:
            return open_checkpoint(path).state
        except CheckpointError as error:  # the Trainer warns about the one that it falls back to
            problem = error
    if problem:
        raise problem
    return None
