"""Train and fine-tune Llama 3 on as many GPUs as there are, with one script.

python train.py --demo --prepare_data        prepare the data once
torchrun --local-addr=127.0.0.1 --nproc_per_node=2 train.py --demo   train on two ranks (plain python: on one)
torchrun --local-addr=127.0.0.1 --nproc_per_node=2 train.py --demo --resume_from=last --max_train_steps=100
python train.py --demo --merge_checkpoint    one file from the shards
python train.py --demo --export_hf           a Hugging Face folder

`--mini` instead of `--demo`, or neither, is the Llama 3 recipe on GPUs. torchrun's --nnodes adds machines.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cli import checks, config_file, doctor, early, export, plan, report, settings
from cli import config as flags
from cli.config import Command
from cli.settings import is_first_rank, world_size
from errors import TrainingFailed, UserError
from trainer import machine
from trainer.ending import complain, end_with_torchrun, record

logger = logging.getLogger("train")

# ---------------------------------------------------------------- prepare


def prepare(command: Command) -> None:
    """Prepare the data, and print the command that trains on them."""
    import torch

    from dataset import preparation, prepare
    from llama3 import assets

    config = command.config
    folder = prepare.prepare(
        dataset_id=config.dataset_id,
        text_column=config.text_column,
        skip_bad_samples=config.skip_bad_samples,
        tokenizer=assets.load_tokenizer(config.tokenizer_id),
        dataset_path=config.dataset_path,
        max_seq_len=config.max_seq_len,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        num_proc=machine.worker_processes(),
    )
    samples = preparation.read(folder)["samples"]["train"]
    global_batch = config.global_batch_size or config.micro_batch_size * config.grad_accumulation_steps
    if samples < global_batch:
        logger.warning(
            "%d samples are fewer than a global batch (%d): prepare more text, or train with a lower "
            "--global_batch_size",
            samples,
            global_batch,
        )
        return
    report.say_next(report.repeated(command, ranks=torch.cuda.device_count()))


# ---------------------------------------------------------------- train


def train(command: Command) -> None:
    """Train, or resume with --resume_from, on every rank of the launcher."""
    from trainer import folders, ranks
    from trainer.checkpoint import checkpoints

    config = command.config
    save_dir = Path(config.save_dir)
    log_dir = Path(config.log_dir)
    inputs = [Path(name) for name in (config.model_id, config.tokenizer_id, config.dataset_path)]
    with joined(command), contextlib.ExitStack() as locks:
        before = ranks.by_first_rank(checkpoints, save_dir)
        trainer, is_fresh = build_trainer(command)
        claim = folders.claimed([save_dir, log_dir], inputs, is_fresh)
        lock = ranks.by_first_rank(locks.enter_context, claim)
        if ranks.by_first_rank(checkpoints, save_dir) != before:
            raise UserError(f"another run saved to {save_dir} while this one started", "Start again")
        ranks.together(lambda: is_first_rank() or folders.check_shared(save_dir, lock))
        report.banner(command, trainer)
        try:
            trainer.run()
        except SystemExit:  # a signal came, and all ranks have saved
            report.say_next(report.continuing(command))
            raise


@contextlib.contextmanager
def joined(command: Command) -> Iterator[None]:
    """Join the other ranks, which must have the same flags but for the folders that rank 0 alone writes."""
    from trainer import ranks

    with ranks.process_group(command.config.timeout_seconds):
        ranks.compare(settings.compared(command.config))
        yield


def build_trainer(command: Command) -> tuple[Any, bool]:
    """Return the Trainer of this run, and whether it starts fresh.

    Needs a process group. An error on one rank is raised on all.
    """
    from trainer import engine, parallel, ranks

    preferred = ranks.by_first_rank(machine.preferred_precision, parallel.pick_device())
    command = settings.resolve_precision(command, preferred)
    config = command.config
    engine_name = "native"  # which evaluates
    if config.mode == "train":
        is_adapter = config.lora_rank is not None
        partitioning = settings.partitioning_flags(config)
        engine_name = ranks.together(engine.choose, config.engine, is_adapter, partitioning)
    resumed = engine.open_resumed(config.resume_from, config.save_dir, engine_name)
    trainer, facts = ranks.together(prepare_trainer, command, engine_name, resumed, preferred)
    ranks.compare(facts)
    return trainer, resumed is None


def prepare_trainer(
    command: Command, engine_name: str, resumed, preferred: str
) -> tuple[Any, dict[str, Any]]:
    """Return the Trainer, and what the ranks must have in common. Raises UserError.

    resumed: a checkpoint or None. preferred: the meaning of --precision=auto, which rank 0 decides for all.
    """
    import torch

    from llama3 import assets
    from trainer import engine
    from trainer.checkpoint import json_digest

    state = resumed.state if resumed else {}
    command = resolve(command, engine_name, resumed, preferred)
    config = command.config
    is_training = config.mode == "train"
    model_config = assets.load_config(config.model_id, config.num_hidden_layers)
    fingerprint, samples = checks.check_data(command, model_config, state)
    if resumed:
        checks.check_same_model(resumed.path, model_config, state)
    checks.check_adapter(command, resumed.path if resumed else None, state)
    if is_training:
        checks.check_reporters(config)
    checks.warn_about_ineffective_flags(command, model_config, is_fresh=not resumed)
    layout, batch = decide_layout(command, engine_name, state)
    settings.warn_about_changed_layout(layout, state)
    if not config.from_scratch and (config.lora_rank or not resumed):
        assets.weight_files(config.model_id)  # downloads them now, so that no rank waits for it later
    train_args = trainer_args(command, model_config, resumed, fingerprint, layout, batch)
    if is_training:
        check_enough_samples(config, samples, train_args)
    elif not train_args.dataset.val_args:
        raise UserError(
            f"{config.dataset_path} has no validation samples",
            "Prepare it with a larger --validation_fraction",
        )
    options = settings.engine_options(config, engine_name, layout)
    facts = {
        "data": fingerprint,
        "the model": json_digest(model_config.to_dict()),
        "torch": torch.__version__,
        "the checkpoint": json_digest(state),
        "the layout": str(layout),
    }
    return engine.trainer_class(engine_name)(train_args=train_args, options=options), facts


def resolve(command: Command, engine_name: str, resumed, preferred: str) -> Command:
    """Return the command with the checkpoint's flags, and with what `auto` means on this machine."""
    config = command.config
    if config.mode == "evaluate" and config.resume_from and not resumed:
        raise UserError(
            f"--resume_from={config.resume_from} is not a checkpoint in {config.save_dir}",
            "Train first, or name another --save_dir or a path",
        )
    if resumed:
        command = settings.resolve_precision(settings.resume_flags(command, resumed.state), preferred)
    command = settings.resolve_compile(command, engine_name)
    settings.warn_about_slow_bf16(command.config)
    return command


def decide_layout(command: Command, engine_name: str, state: dict[str, Any]) -> tuple[Any, int]:
    """Return the Layout of the run and its global batch: the plan's, or without one the flags'."""
    config = command.config
    if config.mode == "train" and engine_name == "native":
        planned = plan.planned(command, state)
        if planned:
            best, batch = planned
            accumulation = best.grad_accumulation_steps
            return settings.layout(config, engine_name, best, accumulation), batch
    copies = world_size() // config.plan_ngpus if config.mode == "train" else world_size()
    batch, accumulation = settings.global_batch(command, copies, state)
    return settings.layout(config, engine_name, None, accumulation), batch


def check_enough_samples(config: flags.Config, samples: int, train_args) -> None:
    """Raise UserError if the training set is smaller than a global batch."""
    batch = train_args.global_batch_size
    if samples >= batch:
        return
    sizes = f"{train_args.micro_batch_size} x {train_args.grad_accumulation_steps}"
    raise UserError(
        f"{config.dataset_path} has {samples} training samples, and a global batch takes {batch} "
        f"({sizes} x {train_args.scaling_factor} data-parallel ranks)",
        "Prepare more text, or lower --micro_batch_size, --grad_accumulation_steps or --global_batch_size",
    )


def trainer_args(command: Command, model_config, resumed, fingerprint: str, layout, batch: int):
    """Return what to train, in nnScaler's terms.

    resumed: a checkpoint or None. fingerprint: the data's. batch: the samples of an optimizer step.
    """
    import torch

    from dataset import batches, sampler
    from llama3 import model
    from trainer import args as interface

    config = command.config
    state = resumed.state if resumed else {}
    train_set, val_set = split_arguments(config, model_config.vocab_size)
    if config.val_every_n_train_steps and not val_set:
        logger.warning("--val_every_n_train_steps, but %s has no validation set", config.dataset_path)
    saved = run_description(config, model_config, fingerprint, layout, batch)
    # Our engine evaluates, and does not partition.
    plan_ngpus = config.plan_ngpus if config.mode == "train" else 1
    optimizer = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    collate = batches.Collator(config.max_seq_len, layout.micro_batch_size)
    return interface.TrainerArgs(
        compute_config=interface.ComputeConfig(plan_ngpus, runtime_ngpus=world_size()),
        model=interface.ModelConfig(model.Llama, settings.model_arguments(config)),
        optimizer=interface.OptimizerConfig(torch.optim.AdamW, optimizer, clip_gnorm=config.clip_gnorm),
        lr_scheduler=interface.LRSchedulerConfig(
            torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": schedule(config, state)}
        ),
        dataset=interface.DatasetConfig(batches.open_split, train_set, val_set),
        dataset_sampler=interface.DatasetSamplerConfig(sampler.GlobalBatchSampler),
        dataloader=interface.DataloaderConfig(
            {"collate_fn": collate, "pin_memory": torch.cuda.is_available()}
        ),
        checkpoint=interface.CheckpointConfig(
            save_dir=config.save_dir,
            every_n_train_steps=config.save_every_n_train_steps,
            keep_last_n_checkpoints=config.keep_last_n_checkpoints,
            resume_from=resumed.path if resumed else None,
        ),
        log=logs(config),
        hook=interface.HookMapConfig(
            on_train_start=lambda _: save_flags(config, saved["config"]),
            on_save_checkpoint=lambda _, state: state.update(saved),
            on_train_end=functools.partial(report.summarize, command, state.get("step", 0), time.monotonic()),
        ),
        micro_batch_size=layout.micro_batch_size,
        grad_accumulation_steps=layout.grad_accumulation_steps,
        global_batch_size=batch,
        **config.select("max_train_steps", "val_every_n_train_steps", "pas_policy", "precision", "seed"),
    )


def run_description(
    config: flags.Config, model_config, fingerprint: str, layout, batch: int
) -> dict[str, Any]:
    """Return the part of a checkpoint's state that replaces this run's flags in a resume or an export."""
    from dataset import check

    return {
        "config": run_flags(config, layout, batch),
        "model": model_config.to_dict(),
        "data": fingerprint,
        "chat": check.holds_conversations(config.dataset_path),  # then --generate asks as a user does
    }


def run_flags(config: flags.Config, layout, batch: int) -> dict[str, Any]:
    """Return the run's flags, resolved: those that only preparing takes are as the data were prepared."""
    from dataset import preparation

    values = config.select(*flags.SETTINGS)
    preparation = preparation.read(config.dataset_path)
    for name in checks.PREPARED_WITH:
        values[name] = {**preparation, **preparation["settings"]}[name]
    values["micro_batch_size"] = layout.micro_batch_size
    values["global_batch_size"] = batch
    return values


def save_flags(config: flags.Config, values: dict[str, Any]) -> None:
    """Write config.yaml beside the metrics and the checkpoints: --config=<that file> repeats the run."""
    from trainer.folders import FLAGS_FILE

    for folder in (config.log_dir, config.save_dir):
        config_file.write(Path(folder, FLAGS_FILE), flags.repeatable(values))


def split_arguments(config: flags.Config, vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that open the training set and the validation set, none for an empty one."""
    from dataset import batches

    common = {
        "dataset_path": config.dataset_path,
        "max_seq_len": config.max_seq_len,
        "vocab_size": vocab_size,
    }
    train_set = {"split": "train", **common}
    val_set = {"split": "validation", "max_samples": config.max_val_samples, **common}
    if len(batches.open_split(**val_set)) == 0:
        val_set = {}
    return train_set, val_set


def schedule(config: flags.Config, resumed_state: dict[str, Any]) -> Callable[[int], float]:
    """Return step -> factor of the learning rate: linear warmup, then constant, or to 0 at the last step."""
    warmup = config.warmup_steps
    total = config.max_train_steps
    kind = config.lr_scheduler
    before = resumed_state.get("config", {}).get("max_train_steps")
    if kind != "constant" and before not in (None, total):
        logger.warning("the %s schedule now ends at step %d, it was %d: the rate jumps", kind, total, before)

    def factor(step: int) -> float:  # step counts from 0
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        if kind == "linear":
            return 1.0 - done
        if kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0

    return factor


def logs(config: flags.Config) -> list:
    """Return the loggers: metrics.jsonl, the progress that a person sees, and those of --report_to."""
    from trainer import loggers
    from trainer.args import LogConfig

    log_dir = {"log_dir": config.log_dir}
    configs = [
        LogConfig(loggers.JsonlLogger, log_dir),
        LogConfig(loggers.Progress, {"last_step": config.max_train_steps}),
    ]
    for name in config.reporters:
        arguments = dict(log_dir)
        if name != "tensorboard":
            arguments["config"] = config.select(*flags.SETTINGS)
        configs.append(LogConfig(loggers.REPORTERS[name], arguments))
    return configs


# ---------------------------------------------------------------- after training


def evaluate(command: Command) -> None:
    """Print the validation loss in nats per target, and before it, where possible, bits per byte of text."""
    from dataset import batches, check, preparation
    from llama3 import assets
    from trainer.loggers import perplexity

    with joined(command):
        trainer, _ = build_trainer(command)
        val_loss = trainer.evaluate()
    if not is_first_rank():
        return
    try:
        path = trainer.args.dataset.val_args["dataset_path"]
        tokenizer = assets.load_tokenizer(preparation.read(path)["tokenizer_id"])
        check.check_prepared(path, tokenizer)
        print(f"bits_per_byte={batches.bits_per_byte(trainer.val_set, tokenizer, val_loss):.6f}")
    except Exception as error:  # the loss below is what was asked for
        logger.warning("no bits per byte: %s", error)
    print(f"val_loss={val_loss:.6f} perplexity={perplexity(val_loss):.6f}")


def merge(command: Command) -> None:
    """Merge a checkpoint's shards into one file."""
    from trainer import engine

    config = command.config
    began = time.perf_counter()
    source = Path(config.merge_checkpoint or f"{config.save_dir}/last")
    merged = Path(config.output_path or f"{config.save_dir}/merged.ckpt")
    engine.open_checkpoint(source).merge(merged)
    size = merged.stat().st_size / 2**30
    seconds = time.perf_counter() - began
    print(f"merged {source} into {merged}: {size:.2f} GiB in {seconds:.1f} s")
    report.say_next(report.repeated(command, export_hf=merged))


def export_hf(command: Command) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    config = command.config
    source = Path(config.export_hf or f"{config.save_dir}/last")
    folder = Path(config.output_path or f"{config.save_dir}/hf")
    _, is_chat = export.export_checkpoint(command, source, folder, config.export_dtype)
    print(
        f"exported {source.resolve()} to {folder}: AutoModelForCausalLM.from_pretrained('{folder}') loads it"
    )
    use = {"chat": True} if is_chat else {"generate": "Once upon a time"}
    report.say_next(report.command_line({**use, "model_id": folder}))


def export_adapter(command: Command) -> None:
    """Write a checkpoint's adapter as peft's own folder."""
    from llama3 import adapters
    from trainer.tensorfile import TensorFileWriter

    config = command.config
    folder = Path(config.output_path or f"{config.save_dir}/adapter")
    source, run_config = export.open_exported(
        command, Path(config.export_adapter or f"{config.save_dir}/last")
    )
    lora = settings.lora_arguments(run_config)
    if lora is None:
        raise UserError(
            f"{source.path} is a checkpoint of a whole model, not of an adapter", checks.WHOLE_MODEL_FIX
        )
    adapters.export_adapter(
        folder, run_config.model_id, lora, source.shapes, source.parameters(), TensorFileWriter
    )
    print(f"exported {source.path} to {folder}: PeftModel.from_pretrained(model, '{folder}') loads it")
    report.say_next(report.repeated(command, export_hf=config.export_adapter or True))


def generate(command: Command) -> None:
    """Print the continuation of --generate's prompt, or the answer to it."""
    from llama3 import sample

    config = command.config
    model, tokenizer, is_chat = export.open_model(command)
    max_new_tokens = config.max_new_tokens or 64
    text = sample.generate_text(
        model, tokenizer, config.generate, max_new_tokens, config.seed, config.temperature, is_chat
    )
    print(text)


def chat(command: Command) -> None:
    """Answer what is typed, until it ends."""
    from llama3 import sample

    config = command.config
    model, tokenizer, _ = export.open_model(command)
    logger.info("chat: /exit, Ctrl-D or Ctrl-C leaves")
    sample.chat(model, tokenizer, config.max_new_tokens or 512, config.seed, config.temperature)


def verify_resume(command: Command) -> None:
    """Fail if a killed and resumed run differs from an undisturbed one."""
    from tools import verify_resume as tool

    config = command.config
    steps = config.max_train_steps if command.is_explicit("max_train_steps") else tool.DEFAULT_STEPS
    if steps < tool.LEAST_STEPS:
        raise UserError(
            f"--verify_resume kills a run between two saves, which needs at least {tool.LEAST_STEPS} steps, "
            f"and --max_train_steps={steps}",
            f"Give --max_train_steps={tool.LEAST_STEPS} or more",
        )
    folder = Path(f"{config.save_dir.rstrip('/')}.verify")
    ranks = verified_ranks(command)
    explicit = {name: getattr(config, name) for name in flags.FLAGS if command.is_explicit(name)}
    difference = tool.verify(Path(__file__).resolve(), explicit, folder, ranks, steps)
    if difference:
        raise TrainingFailed(f"resume is NOT exact: {difference}. Both runs are in {folder}")
    print(f"resume is exact: {steps} steps on {ranks} ranks, losses and weights equal to the last bit")


def verified_ranks(command: Command) -> int:
    """Return how many ranks --verify_resume starts. Raises UserError for more than this machine holds."""
    import torch

    from tools import verify_resume as tool

    config = command.config
    devices = torch.cuda.device_count()
    if devices > 0:
        return tool.cuda_ranks(config.world_size, devices)
    run = plan.run_on_these_devices(command, config.world_size or tool.CPU_RANKS, {})
    state_bytes, _, _ = doctor.host_memory(config, run)
    return tool.cpu_ranks(config.world_size, state_bytes / tool.GIB)


# ---------------------------------------------------------------- start

MODES = {
    "prepare_data": prepare,
    "train": train,
    "evaluate": evaluate,
    "merge_checkpoint": merge,
    "export_hf": export_hf,
    "export_adapter": export_adapter,
    "generate": generate,
    "chat": chat,
    "plan": plan.show,
    "doctor": doctor.show,
    "verify_resume": verify_resume,
}
PARALLEL_MODES = ("train", "evaluate", "doctor")
FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
# Errors that a restart may cure: of a device, of the network, or because another process died.
CURABLE = "CUDA error|cuDNN error|NCCL|gloo|^Dist[A-Z]|killed by signal"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C, 143 by SIGTERM after a save."""
    end_with_torchrun()  # first: the imports take seconds, in which torchrun may be killed
    set_up_logging()
    try:
        machine.provide_home()
        command = early.parse_on_all_nodes(argv, __doc__)
        if command.config.mode not in PARALLEL_MODES and world_size() > 1:
            raise UserError(
                f"--{command.config.mode} runs in one process, and torchrun started {world_size()}",
                "Start it with python instead of torchrun",
            )
        if command.config.mode != "train":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets clean-up code run
        MODES[command.config.mode](command)
        return 0
    except UserError as error:
        return complain(str(error), 2)
    except TrainingFailed as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        if is_first_rank():
            print("train.py: interrupted. Rerun to start over, or add --resume_from=last.", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN or not error.filename:
            return report_bug(error)
        fix = "Make room, or name a folder that can be written"
        return complain(f"{error.filename} cannot be written: {error.strerror}. {fix}.", 1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
            return complain(out_of_memory(error), 1)
        return report_bug(error)


def set_up_logging() -> None:
    """Log to stderr, from rank 0 alone, with a level's name in front of warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LevelFormatter())
    level = logging.INFO if is_first_rank() else logging.ERROR
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(True)  # once, from rank 0, and above the progress bar
    for noisy in ("httpx", "httpx2", "datasets", "torch.distributed", "nnscaler"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # of selective recompute
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # prints text of any language on any terminal


class LevelFormatter(logging.Formatter):
    """Writes "WARNING: " and the like in front of what is above INFO."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno > logging.INFO:
            return f"{record.levelname}: {text}"
        return text


def out_of_memory(error: Exception) -> str:
    """Return the sentence for torch's OutOfMemoryError."""
    rank = os.environ.get("RANK", 0)
    reason = str(error).split(". ")[0]
    return (
        f"rank {rank} has too little GPU memory ({reason}). Use --recompute=full, a lower --mem_constraint, "
        "--micro_batch_size or --max_seq_len, --lora_rank, or more GPUs."
    )


def report_bug(error: Exception) -> int:
    """Print the traceback of an error that is not the user's, and leave it for torchrun; return 1."""
    traceback.print_exc()
    is_curable = re.search(CURABLE, f"{type(error).__name__}: {error}") is not None
    record(traceback.format_exc(), "bug", is_curable)
    return 1


if __name__ == "__main__":
    exit_code = main()
    if exit_code:
        sys.stdout.flush()
        os._exit(exit_code)  # threads and process groups may wait for ranks that never come
