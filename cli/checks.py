"""Compares the flags with the prepared data, the model and the checkpoint, before training begins."""

import importlib.util
import json
import logging
import os
import shlex
from pathlib import Path

from cli.flags import FLAGS, LORA, chosen, reporters
from cli.settings import is_first_rank
from llama3 import presets

logger = logging.getLogger(__name__)

WHOLE_FIX = "--export_hf makes a model of it, which --model_id, --save_dir and --log_dir adapt elsewhere"
PREPARED_WITH = {"dataset_id", "validation_fraction", "text_column"}  # what training cannot change
# Of a model's configuration, what does not change what it computes.
NOT_COMPARED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}


def check_data(args, config, state: dict) -> tuple[str, int]:
    """The prepared data's fingerprint, and the number of training samples.

    Raises ValueError if the data are damaged, or not what the flags or the checkpoint ask for.
    """
    from llama3 import assets, data

    shown = chosen(args, "tokenizer_id", *sorted(PREPARED_WITH), "dataset_path", "max_seq_len", "seed")
    changed = [f"--{name}={value}" for name, value in shown.items() if value != FLAGS[name][0]]
    command = f"{data.PREPARE} {shlex.join(changed)}"
    rows = data.open_split(args.dataset_path, "train", args.max_seq_len, config.vocab_size, command=command)
    node_rank, node_ranks = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    data.verify(args.dataset_path, node_rank, node_ranks or 1)  # the ranks of a node share the files
    fingerprint, before = data.fingerprint(args.dataset_path), state.get("data")
    if args.mode == "train" and before not in (None, fingerprint):
        had = f"{state['config']['dataset_path']} of --resume_from={args.resume_from}"
        if not args.allow_changed_data:
            fix = "give its --dataset_path, or --allow_changed_data if you want to go on with other data"
            raise ValueError(f"{args.dataset_path} holds other data than {had}: {fix}")
        logger.warning("WARNING: %s holds other data than %s: --allow_changed_data", args.dataset_path, had)
    asked = {name: value for name, value in args.given.items() if name in PREPARED_WITH}
    if is_first_rank() and (before != fingerprint or asked or "tokenizer_id" in args.given):
        data.check_prepared(args.dataset_path, assets.load_tokenizer(args.tokenizer_id), **asked)
    return fingerprint, len(rows)


def check_same_model(path: Path, config, state: dict) -> None:
    """Raises ValueError if the flags choose another model than that of the checkpoint."""
    mine = json.loads(json.dumps(config.to_dict()))
    for name, saved in state.get("model", {}).items():
        if name not in NOT_COMPARED and mine.get(name, saved) != saved:
            fix = "leave out the flags that choose the model, or start from the weights (--export_hf)"
            raise ValueError(f"{path} is of a model with {name} {saved}, not {mine[name]}: {fix}")


def check_adapter(args, path: Path | None, state: dict) -> None:
    """Raises ValueError if the flags make no adapter, or another one than the checkpoint's at the path."""
    alone = [f"--{name}" for name in LORA if name in args.given and not args.lora_rank]
    if alone:
        raise ValueError(f"{alone[0]} without --lora_rank: give both, or neither")
    config = state.get("config", {})
    for name in [name for name in LORA if path and name in args.given]:
        mine, saved = getattr(args, name), config.get(name, FLAGS[name][0])
        if mine != saved and not config.get("lora_rank"):
            raise ValueError(f"{path} is of a whole model, not of an adapter: {WHOLE_FIX}")
        if mine != saved:
            fix = f"leave --{name} out, or start afresh without --resume_from"
            raise ValueError(f"{path} is of an adapter with --{name}={saved}, not {mine}: {fix}")


def check_reporters(args) -> None:
    """Raises ValueError if a library that --report_to names is not installed on rank 0, which reports."""
    names = [name for name in reporters(args) if name != "tensorboard"] if is_first_rank() else []
    if missing := " ".join(name for name in names if importlib.util.find_spec(name) is None):
        fix = f"pip install {missing}, or leave it out"
        raise ValueError(f"--report_to={args.report_to}: {missing} is not installed: {fix}")


def say_recompute(args, layers: int) -> None:
    """Warns of more layers than there are."""
    if args.recompute.isdecimal() and int(args.recompute) > layers:
        logger.warning("WARNING: --recompute=%s, the model has %d layers", args.recompute, layers)


def say_what_has_no_effect(args, config, state: dict) -> None:
    """Warns of flags that the model or the run's length leaves without their effect."""
    layers, limit = config.num_hidden_layers, config.max_position_embeddings
    if args.max_seq_len > limit:
        logger.warning("WARNING: --max_seq_len=%d, the model was made for %d", args.max_seq_len, limit)
    say_recompute(args, layers)
    asked = "from_scratch" in args.given or args.model_id == presets.LLAMA3_8B
    if args.from_scratch and not asked and not state:
        logger.warning("WARNING: fresh weights, not those of --model_id=%s", args.model_id)
    if args.warmup_steps >= (last := args.max_train_steps):
        logger.warning("WARNING: --warmup_steps=%d, but the run ends at step %d", args.warmup_steps, last)
