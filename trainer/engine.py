"""Picks the Trainer: nnScaler's own where it can run, else ours; and says which and why."""

import importlib.metadata
import importlib.util
import logging

logger = logging.getLogger(__name__)

NNSCALER_VERSION = "0.8"
TRANSFORMERS_VERSION = "4.48"  # nnScaler's tracer fails inside the modelling code of later ones
INSTALLATION = "https://nnscaler.readthedocs.io/en/latest/installation.html"


def choose(engine: str) -> str:
    """A value of --engine -> 'nnscaler' or 'native', logged with the reason. ValueError: nnScaler was asked for and cannot run."""
    missing = None if engine == "native" else _missing_for_nnscaler()
    if engine == "nnscaler" and missing:
        raise ValueError(f"--engine=nnscaler: {missing}, or use --engine=native")
    name = "native" if engine == "native" or missing else "nnscaler"
    why = (
        f"--engine={engine}"
        if engine != "auto"
        else missing.split(":")[0]
        if missing
        else "nnScaler and CUDA are there"
    )
    logger.info("engine: %s (%s)", name, why)
    return name


def trainer_class(engine: str) -> type:
    """The Trainer of 'nnscaler' or 'native'."""
    if engine == "nnscaler":
        from trainer.nnscaler_engine import Trainer
    else:
        from trainer.trainer import Trainer
    return Trainer


def _missing_for_nnscaler() -> str | None:
    """What nnScaler lacks here, and the fix."""
    if importlib.util.find_spec("nnscaler") is None:
        return f"nnScaler is not installed: see {INSTALLATION} (release {NNSCALER_VERSION}), with requirements-nnscaler.txt"
    found = importlib.metadata.version("transformers")
    if not f"{found}.".startswith(f"{TRANSFORMERS_VERSION}."):
        return f"nnScaler runs with transformers {TRANSFORMERS_VERSION}, not {found}: pip install -r requirements-nnscaler.txt"
    import torch

    if torch.cuda.device_count() == 0:
        return (
            "nnScaler needs CUDA, and there is no CUDA device: run where torch.cuda.device_count() is above 0"
        )
    return None
