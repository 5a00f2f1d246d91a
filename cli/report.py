"""What a person reads before and after a run: what will run, what came of it, the next command to type."""

import logging
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from cli import planning
from cli.flags import FLAGS, MODES, NOT_RESUMED, PRESETS
from cli.settings import is_first_rank, world_size
from trainer import machine

logger = logging.getLogger(__name__)

# Flags that a resume takes from no checkpoint, but does not need again.
ONCE = {"resume_from", "allow_changed_data", "output_path", "config"}


def banner(args, trainer) -> None:
    """Says what the trainer, of either engine, will run; from rank 0."""
    if not is_first_rank():
        return
    from trainer.loggers import REPORTERS

    run, options, data = trainer.args, trainer.options, trainer.args.dataset
    total, length, where = run.global_batch_size, data.train_args["max_seq_len"], data.train_args
    train_set, val_set = (len(data.type(**of)) if of else 0 for of in (data.train_args, data.val_args))
    lines = {"devices": devices(), "model": model(run.model.args, length, run.precision)}
    precise = ", deterministic" if options.deterministic else ""
    compiled = "layers compiled" if options.compile else "layers not compiled"
    lines["precision"] = f"{precision(args, run.precision)}, {compiled}{precise}"
    if not options.predicted_peak_gib:  # else the plan has said this
        batch = f"micro-batch {run.micro_batch_size} x {run.grad_accumulation_steps} accumulated"
        shards = f"{world_size() // options.dp_replicate} shards x {options.dp_replicate} replicas"
        if (devices_each := run.compute_config.plan_ngpus) > 1:
            shards = f"{run.scaling_factor} copies x {devices_each} devices, {run.pas_policy}"
        lines["layout"] = f"recompute {options.recompute}, {shards}, {batch}"
    tokens = f"{train_set:,} samples of {length:,} tokens ({train_set * length:,} tokens)"
    lines["data"] = f"{where['dataset_path']}: {tokens}, {val_set:,} samples for validation"
    lines["batch"] = f"{total:,} samples, {total * length:,} tokens"
    epochs = f"{train_set / total:,.1f} steps an epoch, {run.max_train_steps * total / train_set:.2f} epochs"
    lines["steps"] = f"{run.max_train_steps:,}: {epochs}"
    lines["writes"] = f"checkpoints to {run.checkpoint.save_dir}, metrics to {args.log_dir}/metrics.jsonl"
    used = [config.type for config in run.log]
    if others := [name for name, kind in REPORTERS.items() if kind in used and name != "tensorboard"]:
        lines["reports to"] = ", ".join(others)
    show(lines)


def precision(args, name: str) -> str:
    """Return the run's precision, and where it is fp32 the reason."""
    from trainer import devices, parallel

    if name == "bf16":
        return name
    device = parallel.pick_device()
    if not devices.computes_in_bf16(device):
        return f"fp32 ({devices.slow_bf16_reason(device)})"
    if "precision" in args.given:
        return "fp32 (--precision)"
    return "fp32 (the checkpoint's)"


def devices() -> str:
    """The ranks' devices, which are taken to be alike: 8 x NVIDIA H100 80GB HBM3, nccl."""
    import torch

    on_cuda = torch.cuda.device_count() > 0
    name = f"{torch.cuda.get_device_name()}, nccl" if on_cuda else "CPU, gloo"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return f"{world_size()} x {name}" + (f", on {nodes} nodes" if nodes > 1 else "")


def model(arguments: dict, length: int, precision: str) -> str:
    """The model's name and parameters; with an adapter, those that are trained."""
    from trainer import measure

    total, trained = measure.parameters(planning.measured(arguments, length, precision))
    fresh = " from fresh weights" if arguments["from_scratch"] else ""
    text = f"{arguments['model_id']}{fresh}, {total:,} parameters"
    if lora := arguments["lora"]:
        adapter = f"LoRA of rank {lora['lora_rank']} on {lora['lora_targets']}"
        text += f", {trained:,} of them trained ({trained / total:.2%}): {adapter}"
    return text


def summarize(args, first_step: int, began: float, trainer) -> None:
    """Draws the curves and says what came of the run, from rank 0.

    first_step: where this start of the run began. began: time.monotonic() then.
    """
    if not is_first_rank():
        return
    from tools import curves
    from trainer.loggers import duration

    log_dir = Path(args.log_dir)
    rows = curves.draw(log_dir)
    lines, losses = {}, curves.points(rows, "train_loss")
    steps = [row for row in rows if "step_seconds" in row and row["step"] > first_step]
    seconds = sum(row["step_seconds"] for row in steps)
    tokens = sum(row["step_seconds"] * row["tokens_per_second"] for row in steps)
    if steps:
        spent = f"{len(steps):,} steps in {duration(time.monotonic() - began)}"
        lines["trained"] = f"{spent}: {tokens:,.0f} tokens, {tokens / seconds:,.0f} tokens/s"
        lines["memory"] = memory(trainer, steps)
    if losses:
        ends = dict((losses[0], losses[-1]))
        lines["training"] = ", ".join(f"loss {loss:.4f} at step {step}" for step, loss in ends.items())
    validation = curves.validation_summary(curves.points(rows, "val_loss"))
    lines["validation"] = validation.removeprefix("validation ")
    lines["checkpoint"], lines["curves"] = f"{args.save_dir}/last", f"{log_dir / 'curves.png'}"
    export = {"export_adapter" if args.lora_rank else "export_hf": True}
    lines["next"] = command(export | _given(args, {"save_dir"}))
    lines["or longer"] = continuing(args, max_train_steps=2 * args.max_train_steps)
    show(lines)


def memory(trainer, steps: list[dict]) -> str:
    """The peak; beside what the plan predicted, where there was a plan."""
    predicted = getattr(getattr(trainer, "options", None), "predicted_peak_gib", None)
    if not predicted:
        return f"peak of a rank {max(row['peak_memory_gib'] for row in steps):.2f} GiB"
    what = "peak of a rank" if trainer.device.type == "cuda" else "resident memory of a rank grew by"
    return f"{what} {trainer.grown_gib:.2f} GiB; the plan predicted {predicted:.2f} for its tensors"


def show(lines: dict[str, str]) -> None:
    logger.info("%s", "\n".join(f"  {name:<12}{text}" for name, text in lines.items()))


# ---------------------------------------------------------------- the next command


def say_next(text: str) -> None:
    if is_first_rank():
        logger.info("next: %s", text)


def continuing(args, **more) -> str:
    """The command that goes on from the last checkpoint, on as many ranks as here."""
    # The engine is chosen before the checkpoint is read, and nnScaler trains no adapters.
    kept = _given(args, (NOT_RESUMED | PRESETS.keys() | {"lora_rank"}) - ONCE)
    # A file of flags also holds those that nobody chose.
    defaults = {name: value for name, (value, _, _) in FLAGS.items()}
    chosen = {k: v for k, v in kept.items() if k in args.typed or v != defaults.get(k)}
    return command(chosen | more | dict(resume_from="last"), world_size())


def repeated(args, ranks: int = 1, **more) -> str:
    """The command with another mode, or with none, and the same flags."""
    return command(more | _given(args, args.typed - MODES.keys() - {"output_path"}), ranks)


def command(flags: dict, ranks: int = 1) -> str:
    """A command line for the shell; the ranks are those of all nodes."""
    here = Path(sys.executable).parent
    start, comment = "python" if _found("python", here) else shlex.quote(_near(sys.executable)), ""
    if ranks > 1:
        start = "torchrun" if _found("torchrun", here) else f"{start} -m torch.distributed.run"
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        meet = f" {' '.join(machine.TORCHRUN_FLAGS)}"
        if nodes > 1:
            meet = f" --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint={os.environ['MASTER_ADDR']}:29500"
            comment = "  # on each node"
        start += f"{meet} --nproc_per_node={ranks // nodes}"
    given = [f"--{k}" if value is True or value == "" else f"--{k}={value}" for k, value in flags.items()]
    script = _near(Path(__file__).parents[1] / "train.py")
    return f"{start} {shlex.join([script, *given])}{comment}"


def _given(args, names: set) -> dict:
    return {name: value for name, value in args.given.items() if name in names}


def _found(program: str, folder: Path) -> bool:
    """Does the shell find the program in that folder?"""
    return shutil.which(program) == str(folder / program)


def _near(path) -> str:
    """The path from here, if it is below."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near
