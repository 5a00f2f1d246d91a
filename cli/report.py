"""Prints the banner before a run, the summary after it, and the next command to type."""

import logging
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import plan
from cli.config import DEFAULTS, FLAGS, MODES, Command
from cli.settings import is_first_rank, world_size
from trainer import machine

if TYPE_CHECKING:
    from cli.run import Run

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- before and after a run


def banner(command: Command, trainer) -> None:
    """Log what the trainer, of either engine, will run; from rank 0.

    command: as the user gave it, before a resume took other flags.
    """
    if not is_first_rank():
        return
    run = trainer.args
    options = trainer.options
    max_seq_len = run.dataset.train_args["max_seq_len"]
    lines = {
        "devices": devices(),
        "model": model(run.model.args, max_seq_len, run.precision),
        "precision": _precision(command, run.precision, options),
    }
    if options.layout.predicted_peak_gib is None:  # else the plan's own lines show the layout
        lines["layout"] = _layout(run, options.layout)
    lines |= _data(run, max_seq_len)
    log_dir = command.config.log_dir
    lines["writes"] = f"checkpoints to {run.checkpoint.save_dir}, metrics to {log_dir}/metrics.jsonl"
    reporters = _remote_reporters(run)
    if reporters:
        lines["reports to"] = ", ".join(reporters)
    show(lines)


def _precision(command: Command, name: str, options) -> str:
    text = precision(command, name)
    text += ", layers compiled" if options.layout.compile else ", layers not compiled"
    if options.deterministic:
        text += ", deterministic"
    return text


def precision(command: Command, name: str) -> str:
    """Return the run's precision, and where it is fp32 the reason."""
    from trainer import machine, parallel

    if name == "bf16":
        return name
    device = parallel.pick_device()
    if not machine.computes_in_bf16(device):
        return f"fp32 ({machine.slow_bf16_reason(device)})"
    if command.is_explicit("precision"):
        return "fp32 (--precision)"
    return "fp32 (the checkpoint's)"


def _layout(run, layout) -> str:
    shards = f"{layout.dp_shard} shards x {layout.dp_replicate} replicas"
    if run.compute_config.plan_ngpus > 1:
        shards = f"{run.scaling_factor} copies x {run.compute_config.plan_ngpus} devices, {run.pas_policy}"
    batch = f"micro-batch {run.micro_batch_size} x {run.grad_accumulation_steps} accumulated"
    return f"recompute {layout.recompute}, {shards}, {batch}"


def _data(run, max_seq_len: int) -> dict[str, str]:
    """Return the banner's lines on the data, the batch and the steps."""
    data = run.dataset
    train_samples = len(data.type(**data.train_args))
    val_samples = len(data.type(**data.val_args)) if data.val_args else 0
    batch = run.global_batch_size
    path = data.train_args["dataset_path"]
    tokens = train_samples * max_seq_len
    steps_an_epoch = train_samples / batch
    epochs = run.max_train_steps * batch / train_samples
    return {
        "data": f"{path}: {train_samples:,} samples of {max_seq_len:,} tokens ({tokens:,} tokens), "
        f"{val_samples:,} samples for validation",
        "batch": f"{batch:,} samples, {batch * max_seq_len:,} tokens",
        "steps": f"{run.max_train_steps:,}: {steps_an_epoch:,.1f} steps an epoch, {epochs:.2f} epochs",
    }


def _remote_reporters(run) -> list[str]:
    """Return the names of the reporters besides TensorBoard."""
    from trainer.loggers import REPORTERS

    used = [config.type for config in run.log]
    return [name for name, kind in REPORTERS.items() if kind in used and name != "tensorboard"]


def devices() -> str:
    """Return the ranks' devices, which are taken to be alike: 8 x NVIDIA H100 80GB HBM3, nccl."""
    import torch

    name = "CPU, gloo"
    if torch.cuda.device_count() > 0:
        name = f"{torch.cuda.get_device_name()}, nccl"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    text = f"{world_size()} x {name}"
    if nodes > 1:
        text += f", on {nodes} nodes"
    return text


def model(arguments: dict[str, Any], max_seq_len: int, precision: str) -> str:
    """Return the model's name and parameters; with an adapter, those that are trained.

    arguments: those of llama3.model.Llama.
    """
    from plan import measure

    total, trained = measure.parameters(plan.measured(arguments, max_seq_len, precision))
    text = arguments["model_id"]
    if arguments["from_scratch"]:
        text += " from fresh weights"
    text += f", {total:,} parameters"
    lora = arguments["lora"]
    if lora:
        adapter = f"LoRA of rank {lora['lora_rank']} on {lora['lora_targets']}"
        text += f", {trained:,} of them trained ({trained / total:.2%}): {adapter}"
    return text


def summarize(run: "Run", began: float, trainer) -> None:
    """Draw the curves and log what came of the run, from rank 0.

    began: time.monotonic() when this start of the run did. A picture that cannot be drawn is a warning.
    """
    if not is_first_rank():
        return
    from tools import curves

    command = run.command
    config = command.config
    log_dir = Path(config.log_dir)
    rows = curves.read_metrics(log_dir)
    lines = _speed(run, trainer, rows, began)
    losses = curves.points(rows, "train_loss")
    if losses:
        ends = dict((losses[0], losses[-1]))
        lines["training"] = ", ".join(f"loss {loss:.4f} at step {step}" for step, loss in ends.items())
    validation = curves.validation_summary(curves.points(rows, "val_loss"))
    lines["validation"] = validation.removeprefix("validation ")
    lines["checkpoint"] = f"{config.save_dir}/last"
    try:
        curves.draw(log_dir)
        lines["curves"] = str(log_dir / "curves.png")
    except Exception as error:  # the run itself is complete
        logger.warning("%s cannot be drawn: %s", log_dir / "curves.png", error)
    export = {"export_adapter" if config.lora_rank else "export_hf": True}
    if command.is_explicit("save_dir"):
        export["save_dir"] = config.save_dir
    lines["next"] = command_line(export)
    lines["or longer"] = continuing(command, **_twice_as_long(run))
    show(lines)


def _twice_as_long(run: "Run") -> dict[str, int]:
    """Return the flag of the run's end, doubled."""
    if run.config.max_epochs is not None and run.config.max_train_steps is None:
        return {"max_epochs": 2 * run.config.max_epochs}
    return {"max_train_steps": 2 * run.last_step}


def _speed(run: "Run", trainer, rows: list[dict], began: float) -> dict[str, str]:
    """Return the summary's lines on speed and memory, of the steps of this start."""
    from trainer.loggers import duration

    first_step = run.saved_state.get("step", 0)
    steps = [row for row in rows if "step_seconds" in row and row["step"] > first_step]
    if not steps:
        return {}
    seconds = sum(row["step_seconds"] for row in steps)
    tokens = sum(row["step_seconds"] * row["tokens_per_second"] for row in steps)
    spent = f"{len(steps):,} steps in {duration(time.monotonic() - began)}"
    return {
        "trained": f"{spent}: {tokens:,.0f} tokens, {tokens / seconds:,.0f} tokens/s",
        "memory": memory(run, trainer, steps),
    }


def memory(run: "Run", trainer, steps: list[dict]) -> str:
    """Return the peak of a rank; where there was a plan, as only our engine has, beside its prediction."""
    predicted = run.layout.predicted_peak_gib
    if predicted is None:
        return f"peak of a rank {max(row['peak_memory_gib'] for row in steps):.2f} GiB"
    measured = "resident memory of a rank grew by"
    if trainer.device.type == "cuda":
        measured = "peak of a rank"
    return f"{measured} {trainer.grown_gib:.2f} GiB; the plan predicted {predicted:.2f} for its tensors"


def show(lines: dict[str, str]) -> None:
    """Log the lines, aligned behind their names."""
    logger.info("%s", "\n".join(f"  {name:<12}{text}" for name, text in lines.items()))


# ---------------------------------------------------------------- the next command


def say_next(text: str) -> None:
    """Log the next command, from rank 0."""
    if is_first_rank():
        logger.info("next: %s", text)


def continuing(command: Command, **flags) -> str:
    """Return the command that goes on from the last checkpoint, on as many ranks as now.

    Holds the explicit flags that a resume does not take from its checkpoint; of --config's file, which also
    holds flags that nobody chose, those that differ from their defaults.
    """
    kept = {}
    for name, flag in FLAGS.items():
        value = getattr(command.config, name)
        is_chosen = command.is_typed(name) or (command.is_explicit(name) and value != DEFAULTS[name])
        if flag.continued and is_chosen:
            kept[name] = value
    kept |= flags
    kept["resume_from"] = "last"
    return command_line(kept, world_size())


def repeated(command: Command, ranks: int = 1, **flags) -> str:
    """Return the command with another mode, or with none, and the same typed flags."""
    kept = dict(flags)
    for name in FLAGS:
        if command.is_typed(name) and name not in MODES and name != "output_path":
            kept[name] = getattr(command.config, name)
    return command_line(kept, ranks)


def command_line(flags: dict[str, Any], ranks: int = 1) -> str:
    """Return a command for the shell.

    flags: their values by name; True stands for a switch. ranks: those of all nodes.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    start = _program("python")
    if ranks > 1:
        start = _torchrun(nodes) + f" --nproc_per_node={ranks // nodes}"
    words = [_relative(Path(__file__).parents[1] / "train.py")]
    for name, value in flags.items():
        is_bare = value is True or value == ""
        words.append(f"--{name}" if is_bare else f"--{name}={value}")
    comment = "  # on each node" if ranks > 1 and nodes > 1 else ""
    return f"{start} {shlex.join(words)}{comment}"


def _torchrun(nodes: int) -> str:
    """Return torchrun with the flags that let its nodes meet."""
    if nodes == 1:
        return " ".join([_program("torchrun"), *machine.TORCHRUN_FLAGS])
    endpoint = f"{os.environ['MASTER_ADDR']}:29500"
    return f"{_program('torchrun')} --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint={endpoint}"


def _program(name: str) -> str:
    """Return python or torchrun, as the shell finds those of this environment."""
    folder = Path(sys.executable).parent
    if shutil.which(name) == str(folder / name):
        return name
    python = shlex.quote(_relative(sys.executable))
    return python if name == "python" else f"{python} -m torch.distributed.run"


def _relative(path: str | Path) -> str:
    """Return the path relative to the working directory, if it is below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
