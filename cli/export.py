"""Reads checkpoints of either engine, writes them as Hugging Face folders, and opens models to talk to."""

import functools
import logging
import tempfile
from pathlib import Path
from typing import Any

from cli import checks, settings
from cli.config import LORA, SETTINGS, Command, Config

logger = logging.getLogger(__name__)


def open_exported(command: Command, path: Path) -> tuple[Any, Config]:
    """Return a checkpoint, verified, and the configuration of its run with this command's explicit flags."""
    from llama3 import assets
    from trainer import engine

    config = command.config
    source = engine.open_checkpoint(path)
    source.verify()
    saved = source.state.get("config", {})
    is_other_model = command.is_explicit("model_id") and config.model_id != saved.get("model_id")
    if command.is_explicit("num_hidden_layers") or (is_other_model and "model_id" in saved):
        model_config = assets.load_config(config.model_id, config.num_hidden_layers)
        checks.check_same_model(source.path, model_config, source.state)
    if any(command.is_explicit(name) for name in LORA):
        checks.check_adapter(command, source.path, source.state)
    return source, _run_config(command, saved)


def _run_config(command: Command, saved: dict[str, Any]) -> Config:
    """Return the run's own flags under this command's explicit ones; the adapter is always the run's.

    nnScaler's own demo saves no flags: this command's flags must describe its model.
    """
    values = {name: saved[name] for name in SETTINGS if name in saved}
    for name in SETTINGS:
        if command.is_explicit(name) and name not in LORA:
            values[name] = getattr(command.config, name)
    for name in LORA:
        values[name] = saved.get(name)
    return command.replace(**values).config


def export_checkpoint(command: Command, path: Path, folder: Path, dtype: str | None) -> tuple[Any, bool]:
    """Write a checkpoint, tensor by tensor, as a Hugging Face folder.

    dtype: 'bf16', 'fp32', or None for the run's precision. Returns its tokenizer, and whether it was trained
    on conversations.
    """
    from llama3 import assets
    from llama3.export import export_hf
    from trainer import machine, parallel
    from trainer.tensorfile import TensorFileWriter

    source, run_config = open_exported(command, path)
    tokenizer = assets.load_tokenizer(run_config.tokenizer_id)
    model_config = source.state.get("model")
    if model_config is None:
        config = command.config
        model_config = assets.load_config(config.model_id, config.num_hidden_layers).to_dict()
    if dtype is None:
        preferred = machine.preferred_precision(parallel.pick_device())
        dtype = source.state.get("config", {}).get("precision", preferred)
    shapes = source.shapes
    tensors = source.parameters()
    if run_config.lora_rank:
        shapes, tensors = merge_adapter(source, run_config)
    export_hf(folder, model_config, tokenizer, shapes, tensors, dtype, TensorFileWriter)
    return tokenizer, source.state.get("chat", False)


def merge_adapter(source, config: Config) -> tuple[dict[str, tuple], Any]:
    """Return the shapes of the base's tensors, and the tensors with the adapter added, one at a time."""
    from llama3 import adapters, assets, model
    from trainer.checkpoint import Checkpoint, json_digest

    model_config = assets.load_config(config.model_id)
    base = Checkpoint.of_weights(model.weight_files(config.model_id, model_config))
    source.check_frozen(json_digest(base.digests()))
    weights = ((name, base.read(name)) for name in base.tensors)
    shapes = {name: shape for name, (_, shape) in base.tensors.items()}
    readers = {name: functools.partial(source.read, f"model.{name}") for name in source.shapes}
    scale = config.lora_alpha / config.lora_rank
    return shapes, adapters.merged(weights, readers, scale)


def open_model(command: Command) -> tuple[Any, Any, bool]:
    """Return a model, its tokenizer, and whether it was trained on conversations.

    The model is that of --resume_from, else of --model_id if that is typed, else of the run's last checkpoint
    if there is one.
    """
    from llama3 import assets, sample
    from trainer import machine, parallel

    command = settings.resolve_precision(command, machine.preferred_precision(parallel.pick_device()))
    config = command.config
    settings.warn_about_slow_bf16(config)
    resume_from = config.resume_from
    if resume_from is None and not command.is_typed("model_id") and Path(config.save_dir, "last").exists():
        resume_from = "last"
    if resume_from is None:
        assets.weight_files(config.model_id)  # says what is missing
        logger.info("model: %s, in %s", config.model_id, config.precision)
        tokenizer = assets.load_tokenizer(config.tokenizer_id)
        return sample.load(assets.model_folder(config.model_id), config.precision), tokenizer, False
    source = Path(resume_from)
    if resume_from in ("last", "best"):
        source = Path(config.save_dir, resume_from)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "hf")
        tokenizer, is_chat = export_checkpoint(command, source, folder, config.precision)
        logger.info("model: %s, in %s", source, config.precision)
        return sample.load(folder, config.precision), tokenizer, is_chat
