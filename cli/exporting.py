"""Reads checkpoints of either engine, writes them as Hugging Face folders, and opens models to talk to."""

import argparse
import functools
import logging
import tempfile
from pathlib import Path

from cli import checks, settings
from cli.flags import LORA
from cli.settings import lora

logger = logging.getLogger(__name__)


def open_exported(args, path: Path):
    """A checkpoint, verified, and the flags of its run with those of this command."""
    from llama3 import assets
    from trainer import engine

    source = engine.open_checkpoint(path)
    source.verify()
    saved = source.state.get("config", {})
    had = saved.get("model_id")
    if "num_hidden_layers" in args.given or args.given.get("model_id", had) != had:
        config = assets.load_config(args.model_id, args.num_hidden_layers)
        checks.check_same_model(source.path, config, source.state)
    if args.given.keys() & set(LORA):
        checks.check_adapter(args, source.path, source.state)
    # nnScaler's own demo saves no flags and no configuration: this command's flags must describe its model.
    own = {name: args.given[name] for name in args.given.keys() - set(LORA)}
    return source, argparse.Namespace(**{**vars(args), **dict.fromkeys(LORA), **saved, **own})


def export_checkpoint(args, path: Path, folder: Path, dtype: str | None):
    """Writes a checkpoint, tensor by tensor, as a Hugging Face folder.

    Returns its tokenizer, and whether it was trained on conversations.
    """
    from llama3 import assets
    from llama3.export import export_hf
    from trainer import devices, parallel
    from trainer.tensorfile import TensorFileWriter

    source, flags = open_exported(args, path)
    tokenizer = assets.load_tokenizer(flags.tokenizer_id)
    config = source.state.get("model") or assets.load_config(args.model_id, args.num_hidden_layers).to_dict()
    if dtype is None:
        preferred = devices.preferred_precision(parallel.pick_device())
        dtype = source.state.get("config", {}).get("precision", preferred)
    shapes, tensors = source.shapes, source.parameters()
    if lora(flags):
        shapes, tensors = merge_adapter(source, flags)
    export_hf(folder, config, tokenizer, shapes, tensors, dtype, TensorFileWriter)
    return tokenizer, source.state.get("chat", False)


def merge_adapter(source, flags):
    """The shapes of the base's tensors, and the tensors with the adapter added, one at a time."""
    from llama3 import adapters, assets, model
    from trainer.checkpoint import Checkpoint, json_digest

    base = Checkpoint.of_weights(model.weight_files(flags.model_id, assets.load_config(flags.model_id)))
    source.check_frozen(json_digest(base.digests()))
    weights = ((name, base.read(name)) for name in base.tensors)
    scale = flags.lora_alpha / flags.lora_rank
    shapes = {name: shape for name, (_, shape) in base.tensors.items()}
    readers = {name: functools.partial(source.read, f"model.{name}") for name in source.shapes}
    return shapes, adapters.merged(weights, readers, scale)


def open_model(args):
    """The model of --resume_from, else of --model_id if that is typed, else the run's last checkpoint if any.

    Returns it with its tokenizer, and whether it was trained on conversations.
    """
    from llama3 import assets, sample
    from trainer import devices, parallel

    args = settings.with_precision(args, devices.preferred_precision(parallel.pick_device()))
    settings.warn_about_slow_bf16(args)
    if not args.resume_from and "model_id" not in args.typed and Path(args.save_dir, "last").exists():
        args.resume_from = "last"
    with tempfile.TemporaryDirectory() as temporary:
        if args.resume_from:
            named = args.resume_from in ("last", "best")
            source = Path(args.save_dir if named else "", args.resume_from)
            folder = Path(temporary, "hf")
            tokenizer, is_chat = export_checkpoint(args, source, folder, args.precision)
        else:
            source, is_chat = args.model_id, False
            assets.weight_files(args.model_id)  # says what is missing
            folder = assets.model_folder(args.model_id)
            tokenizer = assets.load_tokenizer(args.tokenizer_id)
        logger.info("model: %s, in %s", source, args.precision)
        return sample.load(folder, args.precision), tokenizer, is_chat
