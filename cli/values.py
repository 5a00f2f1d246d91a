"""Checks of flags by themselves and in combination: no data, no model and no heavy import."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError, raise_together
from llama3 import presets

if TYPE_CHECKING:
    from cli.config import Config

RECOMPUTE_MODES = ("auto", "none", "selective", "full")
REPORTERS = ("tensorboard", "wandb", "trackio")
PROMPT_MODES = ("generate", "chat")


def check(config: "Config", least: dict[str, float]) -> None:
    """Raise the UserErrors of all flags that are wrong, together.

    least: the smallest allowed value of each flag that has one.
    """
    errors = _number_errors(config, least)
    errors += _name_errors(config)
    errors += _model_errors(config)
    errors += _mode_errors(config)
    raise_together(errors)


def _number_errors(config: "Config", least: dict[str, float]) -> list[UserError]:
    errors = []
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is None:
            continue
        if value == math.inf:
            errors.append(UserError(f"--{name} must be finite (got {value})", "Give a number"))
        elif not value >= smallest:
            errors.append(
                UserError(f"--{name} must be >= {smallest} (got {value})", f"Give {smallest} or more")
            )
    if config.validation_fraction >= 1:
        errors.append(
            UserError(
                f"--validation_fraction must be below 1 (got {config.validation_fraction})",
                "Give a share of the documents, such as 0.01",
            )
        )
    if config.seed >= 2**32:
        errors.append(UserError(f"--seed must be below 2^32 (got {config.seed})", "Give a smaller number"))
    return errors


def _name_errors(config: "Config") -> list[UserError]:
    errors = []
    if config.recompute not in RECOMPUTE_MODES and not config.recompute.isdecimal():
        errors.append(
            UserError(
                f"--recompute does not take {config.recompute!r}",
                "Give auto, none, selective, full, or a number of layers",
            )
        )
    targets = set(config.lora_targets.split(","))
    unknown = sorted(targets - set(presets.LORA_TARGETS))
    if config.lora_targets != "all-linear" and unknown:
        errors.append(
            UserError(
                f"--lora_targets names {', '.join(unknown)}, which is not a linear layer of Llama",
                f"Give all-linear, or some of {', '.join(presets.LORA_TARGETS)}",
            )
        )
    unknown = sorted(set(config.reporters) - set(REPORTERS))
    if unknown:
        errors.append(
            UserError(
                f"--report_to names {', '.join(unknown)}, which is not a reporter",
                f"Give some of {', '.join(REPORTERS)} with commas between them, or none",
            )
        )
    return errors


def _model_errors(config: "Config") -> list[UserError]:
    errors = []
    model = Path(config.model_id)
    holds_checkpoints = (model / "manifest.json").exists() or (model / "last" / "manifest.json").exists()
    if holds_checkpoints or config.model_id.endswith(".ckpt"):
        errors.append(
            UserError(
                f"--model_id={config.model_id} is a checkpoint, not a model",
                "Continue it with --resume_from, or make a model of it with --export_hf",
            )
        )
    if (model / "adapter_config.json").exists():
        errors.append(
            UserError(
                f"--model_id={config.model_id} is an adapter without its model",
                "Export its checkpoint with --export_hf, or continue it with --resume_from",
            )
        )
    if config.lora_rank and config.from_scratch:
        errors.append(
            UserError(
                f"--lora_rank={config.lora_rank} adapts a pretrained model, and this one starts from scratch",
                "Leave out --lora_rank, or --from_scratch and --num_hidden_layers",
            )
        )
    return errors


def _mode_errors(config: "Config") -> list[UserError]:
    errors = []
    if config.mode in ("plan", "doctor", "verify_resume") and config.resume_from:
        errors.append(
            UserError(
                f"--{config.mode} does not read a checkpoint (got --resume_from={config.resume_from})",
                "Leave --resume_from out",
            )
        )
    if config.generate == "":
        errors.append(UserError("--generate got an empty prompt", "Give a prompt of at least one token"))
    return errors
