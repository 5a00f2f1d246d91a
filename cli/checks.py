"""Compares the flags with the prepared data, the model and the checkpoint, before training begins."""

import importlib.util
import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

from cli.config import DEFAULTS, LORA, Command, Config
from cli.settings import is_first_rank
from errors import UserError
from llama3 import presets

logger = logging.getLogger(__name__)

PREPARED_WITH = ("dataset_id", "text_column", "validation_fraction")  # training cannot change these
# Of a model's configuration, the fields that do not change what it computes.
NOT_COMPARED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}
WHOLE_MODEL_FIX = "Export it with --export_hf, and adapt the result with --model_id in another --save_dir"


def prepare_command(config: Config) -> str:
    """Return the command that prepares the data which these flags ask for."""
    names = ("tokenizer_id", *PREPARED_WITH, "dataset_path", "max_seq_len", "seed")
    flags = [f"--{name}={getattr(config, name)}" for name in names if getattr(config, name) != DEFAULTS[name]]
    return f"python train.py --prepare_data {shlex.join(flags)}"


def check_data(command: Command, model_config, state: dict[str, Any]) -> tuple[str, int]:
    """Return the prepared data's fingerprint and the number of training samples.

    state: the resumed checkpoint's, empty for a fresh start. Raises UserError if the data are damaged, or
    not those that the flags or the checkpoint ask for.
    """
    from dataset import batches, check
    from llama3 import assets

    config = command.config
    rows = batches.open_split(
        config.dataset_path,
        "train",
        config.max_seq_len,
        model_config.vocab_size,
        command=prepare_command(config),
    )
    # The ranks of a node share the files.
    node_rank = int(os.environ.get("LOCAL_RANK", 0))
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check.verify(config.dataset_path, node_rank, node_ranks)
    fingerprint = check.fingerprint(config.dataset_path)
    if config.mode == "train":
        _check_same_data(config, fingerprint, state)
    explicit = {name: getattr(config, name) for name in PREPARED_WITH if command.is_explicit(name)}
    is_new = state.get("data") != fingerprint
    if is_first_rank() and (is_new or explicit or command.is_explicit("tokenizer_id")):
        tokenizer = assets.load_tokenizer(config.tokenizer_id)
        check.check_prepared(config.dataset_path, tokenizer, **explicit)
    return fingerprint, len(rows)


def _check_same_data(config: Config, fingerprint: str, state: dict[str, Any]) -> None:
    """Raise UserError, or warn if --allow_changed_data, of other data than the checkpoint's run had."""
    if state.get("data") in (None, fingerprint):
        return
    before = state["config"]["dataset_path"]
    if not config.allow_changed_data:
        raise UserError(
            f"{config.dataset_path} holds other data than {before}, on which the checkpoint "
            f"--resume_from={config.resume_from} was trained",
            "Give its --dataset_path, or --allow_changed_data to go on with other data",
        )
    logger.warning("%s holds other data than %s: --allow_changed_data", config.dataset_path, before)


def check_same_model(path: Path, model_config, state: dict[str, Any]) -> None:
    """Raise UserError if the flags choose another model than that of the checkpoint at the path."""
    ours = json.loads(json.dumps(model_config.to_dict()))
    for name, saved in state.get("model", {}).items():
        if name not in NOT_COMPARED and ours.get(name, saved) != saved:
            raise UserError(
                f"{path} is a checkpoint of a model with {name} {saved}, not {ours[name]}",
                "Leave out the flags that choose the model, or start from its weights (--export_hf)",
            )


def check_adapter(command: Command, path: Path | None, state: dict[str, Any]) -> None:
    """Raise UserError if the flags make no adapter, or another one than the checkpoint's at the path."""
    config = command.config
    explicit = [name for name in LORA if command.is_explicit(name)]
    if explicit and config.lora_rank is None:
        raise UserError(f"--{explicit[0]} was given without --lora_rank", "Give both, or neither")
    if path is None:
        return
    saved = state.get("config", {})
    for name in explicit:
        value = getattr(config, name)
        before = saved.get(name, DEFAULTS[name])
        if value == before:
            continue
        if not saved.get("lora_rank"):
            raise UserError(f"{path} is a checkpoint of a whole model, not of an adapter", WHOLE_MODEL_FIX)
        raise UserError(
            f"{path} is a checkpoint of an adapter with --{name}={before}, not {value}",
            f"Leave --{name} out, or start afresh without --resume_from",
        )


def check_reporters(config: Config) -> None:
    """Raise UserError if a library that --report_to names is not installed on rank 0, which reports."""
    if not is_first_rank():
        return
    names = [name for name in config.reporters if name != "tensorboard"]
    missing = " ".join(name for name in names if importlib.util.find_spec(name) is None)
    if missing:
        raise UserError(
            f"--report_to={config.report_to} needs {missing}, which is not installed",
            f"Install it with `pip install {missing}`, or leave it out",
        )


def warn_about_recompute(config: Config, layers: int) -> None:
    """Warn of more recomputed layers than there are."""
    if isinstance(config.recompute_mode, int) and config.recompute_mode > layers:
        logger.warning("--recompute=%s, the model has %d layers", config.recompute, layers)


def warn_about_ineffective_flags(command: Command, model_config, is_fresh: bool, last_step: int) -> None:
    """Warn of flags that the model or the run's length leaves without their effect."""
    config = command.config
    longest = model_config.max_position_embeddings
    if config.max_seq_len > longest:
        logger.warning("--max_seq_len=%d, the model was made for %d", config.max_seq_len, longest)
    warn_about_recompute(config, model_config.num_hidden_layers)
    is_expected = command.is_explicit("from_scratch") or config.model_id == presets.LLAMA3_8B
    if config.from_scratch and is_fresh and not is_expected:
        logger.warning("fresh weights, not those of --model_id=%s", config.model_id)
    if config.warmup_steps >= last_step:
        logger.warning("--warmup_steps=%d, but the run ends at step %d", config.warmup_steps, last_step)
