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

from cli import checks, doctor, early, export, plan, report, settings
from cli import config as flags
from cli import run as run_setup
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
    """Return the Trainer of the command's run, and whether it starts fresh. Needs a process group."""
    from trainer import ranks

    run = run_setup.prepare(command)
    trainer = ranks.together(make_trainer, run)
    return trainer, run.resumed is None


def make_trainer(run: run_setup.Run):
    """Return the Trainer of a run: data, model, optimizer, schedule and checkpoints, in nnScaler's terms."""
    import torch

    from dataset.batches import Collator, open_split
    from dataset.sampler import GlobalBatchSampler
    from llama3.model import Llama
    from trainer import args, engine

    config = run.config
    layout = run.layout
    collate = Collator(config.max_seq_len, layout.micro_batch_size)
    loader = {"collate_fn": collate, "pin_memory": torch.cuda.is_available()}
    adamw = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    factor = schedule(config, run.last_step, run.saved_state)
    description = run.description()
    train_args = args.TrainerArgs(
        dataset=args.DatasetConfig(open_split, run.train_set, run.val_set),
        dataset_sampler=args.DatasetSamplerConfig(GlobalBatchSampler),
        dataloader=args.DataloaderConfig(loader),
        model=args.ModelConfig(Llama, settings.model_arguments(config)),
        optimizer=args.OptimizerConfig(torch.optim.AdamW, adamw, clip_gnorm=config.clip_gnorm),
        lr_scheduler=args.LRSchedulerConfig(torch.optim.lr_scheduler.LambdaLR, {"lr_lambda": factor}),
        compute_config=args.ComputeConfig(run.plan_ngpus, runtime_ngpus=world_size()),
        micro_batch_size=layout.micro_batch_size,
        grad_accumulation_steps=layout.grad_accumulation_steps,
        global_batch_size=run.global_batch_size,
        max_train_steps=run.last_step,
        checkpoint=args.CheckpointConfig(
            save_dir=config.save_dir,
            every_n_train_steps=config.save_every_n_train_steps,
            keep_last_n_checkpoints=config.keep_last_n_checkpoints,
            resume_from=run.resumed.path if run.resumed else None,
        ),
        log=logs(config, run.last_step),
        hook=args.HookMapConfig(
            on_train_start=lambda _: run.save_flags(),
            on_save_checkpoint=lambda _, state: state.update(description),
            on_train_end=functools.partial(report.summarize, run, time.monotonic()),
        ),
        **config.select("val_every_n_train_steps", "pas_policy", "precision", "seed"),
    )
    options = settings.engine_options(config, run.engine_name, layout)
    return engine.trainer_class(run.engine_name)(train_args=train_args, options=options)


def schedule(config: flags.Config, last_step: int, resumed_state: dict[str, Any]) -> Callable[[int], float]:
    """Return step -> factor of the learning rate: linear warmup, then constant, or to 0 at the last step."""
    warmup = config.warmup_steps
    kind = config.lr_scheduler
    before = resumed_state.get("last_step")
    if kind != "constant" and before not in (None, last_step):
        logger.warning(
            "the %s schedule now ends at step %d, it was %d: the rate jumps", kind, last_step, before
        )

    def factor(step: int) -> float:  # step counts from 0
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, last_step - warmup))
        if kind == "linear":
            return 1.0 - done
        if kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0

    return factor


def logs(config: flags.Config, last_step: int) -> list:
    """Return the loggers: metrics.jsonl, the progress that a person sees, and those of --report_to."""
    from trainer import loggers
    from trainer.args import LogConfig

    log_dir = {"log_dir": config.log_dir}
    configs = [
        LogConfig(loggers.JsonlLogger, log_dir),
        LogConfig(loggers.Progress, {"last_step": last_step}),
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
