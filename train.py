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
from pathlib import Path

from cli import checks, diagnosing, exporting, flagfile, flags, planning, report, settings
from cli.flags import chosen, reporters
from cli.settings import is_first_rank, world_size
from errors import TrainingFailed, UserError
from trainer import machine
from trainer.ending import complain, record

logger = logging.getLogger("train")

# ---------------------------------------------------------------- prepare


def prepare(args) -> None:
    import torch

    from llama3 import assets, data

    source = chosen(args, "dataset_id", "text_column", "skip_bad_samples")
    samples = chosen(args, "dataset_path", "max_seq_len", "validation_fraction", "seed")
    folder = data.prepare(
        tokenizer=assets.load_tokenizer(args.tokenizer_id),
        num_proc=machine.worker_processes(),
        **source,
        **samples,
    )
    found = data.read_preparation(folder)["samples"]["train"]
    if found < (needed := args.global_batch_size or args.micro_batch_size * args.grad_accumulation_steps):
        fix = "prepare more text, or train with a lower --global_batch_size"
        logger.warning("WARNING: %d samples are fewer than a global batch (%d): %s", found, needed, fix)
    else:
        report.say_next(report.repeated(args, torch.cuda.device_count()))


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
        report.banner(args, trainer)
        try:
            trainer.run()
        except SystemExit:  # a signal came, and all ranks have saved
            report.say_next(report.continuing(args))
            raise


@contextlib.contextmanager
def joined(args):
    """Joins the other ranks, which must have the same flags but for the folders that rank 0 alone writes."""
    from trainer import ranks

    with ranks.process_group(args.timeout_seconds):
        ranks.compare(settings.compared(args))
        yield


def build_trainer(args):
    """The Trainer of this run, and whether it starts fresh.

    Needs a process group. What one rank finds wrong, all ranks raise.
    """
    from trainer import devices, engine, parallel, ranks

    preferred = ranks.by_first_rank(devices.preferred_precision, parallel.pick_device())
    args = settings.with_precision(args, preferred)
    wanted = args.engine, bool(args.lora_rank), settings.partition(args)
    name = ranks.together(engine.choose, *wanted) if args.mode == "train" else "native"
    resumed = engine.open_resumed(args.resume_from, args.save_dir, name)
    trainer, facts = ranks.together(prepare_trainer, args, name, resumed, preferred)
    ranks.compare(facts)
    return trainer, resumed is None


def prepare_trainer(args, engine_name: str, resumed, preferred: str):
    """The Trainer, and what the ranks must have in common. Raises what the user can mend, as a ValueError.

    preferred: the precision that --precision=auto means, which rank 0 decides for all.
    """
    import torch

    from llama3 import assets
    from trainer import engine
    from trainer.checkpoint import json_digest

    if args.mode == "evaluate" and args.resume_from and not resumed:
        fix = "train first, or name another --save_dir or a path"
        raise ValueError(f"--resume_from={args.resume_from}: no such checkpoint in {args.save_dir}: {fix}")
    state = resumed.state if resumed else {}
    if resumed:
        args = settings.with_precision(flags.resolve_resumed(args, state), preferred)
    settings.warn_about_slow_bf16(args)
    settings.check_compiler(args)
    config = assets.load_config(args.model_id, args.num_hidden_layers)
    fingerprint, samples = checks.check_data(args, config, state)
    if resumed:
        checks.check_same_model(resumed.path, config, state)
    checks.check_adapter(args, resumed and resumed.path, state)
    if args.mode == "train":
        checks.check_reporters(args)
    checks.say_what_has_no_effect(args, config, state)
    plan = None
    if (args.mode, engine_name) == ("train", "native"):
        args, plan = planning.planned(args, state)
    if not args.from_scratch and (args.lora_rank or not resumed):
        assets.weight_files(args.model_id)  # downloads them now, so that no rank waits for it later
    train_args = trainer_args(args, config, resumed, fingerprint)
    if args.mode == "train" and samples < (needed := train_args.global_batch_size):
        lower = "--micro_batch_size, --grad_accumulation_steps or --global_batch_size"
        copies = f"{train_args.scaling_factor} data-parallel ranks"
        sizes = f"{args.micro_batch_size} x {train_args.grad_accumulation_steps} x {copies}"
        has = f"{args.dataset_path} has {samples} training samples, a global batch {needed} ({sizes})"
        raise ValueError(f"{has}: prepare more text, or lower {lower}")
    if args.mode == "evaluate" and not train_args.dataset.val_args:
        fix = "prepare it with a larger --validation_fraction"
        raise ValueError(f"{args.dataset_path} has no validation samples: {fix}")
    options = settings.engine_options(args, engine_name, plan)
    facts = {"data": fingerprint, "the model": json_digest(config.to_dict()), "torch": torch.__version__}
    layout = f"recompute {options.recompute}, {options.dp_replicate} x {train_args.micro_batch_size}"
    facts |= {"the checkpoint": json_digest(state), "the plan": layout}
    return engine.trainer_class(engine_name)(train_args=train_args, options=options), facts


def trainer_args(args, config, resumed, fingerprint: str):
    """What to train, in nnScaler's terms. resumed: a checkpoint or None. fingerprint: the data's."""
    import torch

    from llama3 import data, model
    from trainer import args as interface

    state, resume_from = (resumed.state, resumed.path) if resumed else (None, None)
    began_at = (state or {}).get("step", 0)
    train_set, val_set = split_arguments(args, config.vocab_size)
    adamw = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_lambda = torch.optim.lr_scheduler.LambdaLR, dict(lr_lambda=schedule(args, state))
    collate = data.Collator(args.max_seq_len, args.micro_batch_size)
    # With these, resuming or exporting a checkpoint does not need this run's flags.
    about = dict(config=effective_flags(args), model=config.to_dict(), data=fingerprint)
    about["chat"] = data.holds_conversations(args.dataset_path)  # then --generate asks as a user does
    if args.val_every_n_train_steps and not val_set:
        logger.warning("WARNING: --val_every_n_train_steps, but %s has no validation set", args.dataset_path)
    plan_ngpus = args.plan_ngpus if args.mode == "train" else 1  # our engine evaluates
    train_args = interface.TrainerArgs(
        compute_config=interface.ComputeConfig(plan_ngpus, runtime_ngpus=world_size()),
        model=interface.ModelConfig(model.Llama, settings.model_arguments(args)),
        optimizer=interface.OptimizerConfig(torch.optim.AdamW, adamw, clip_gnorm=args.clip_gnorm),
        lr_scheduler=interface.LRSchedulerConfig(*lr_lambda),
        dataset=interface.DatasetConfig(data.open_split, train_set, val_set),
        dataloader=interface.DataloaderConfig(dict(collate_fn=collate, pin_memory=torch.cuda.is_available())),
        checkpoint=interface.CheckpointConfig(
            every_n_train_steps=args.save_every_n_train_steps,
            resume_from=resume_from,
            **chosen(args, "save_dir", "keep_last_n_checkpoints"),
        ),
        log=logs(args),
        hook=interface.HookMapConfig(
            on_train_start=lambda _: save_flags(args, about["config"]),
            on_save_checkpoint=lambda _, state: state.update(about),
            on_train_end=functools.partial(report.summarize, args, began_at, time.monotonic()),
        ),
        **settings.batch_sizes(args, state),
        **chosen(args, "micro_batch_size", "max_train_steps", "val_every_n_train_steps"),
        **chosen(args, "pas_policy", "precision", "seed"),
    )
    about["config"]["global_batch_size"] = train_args.global_batch_size
    return train_args


def effective_flags(args) -> dict:
    """The flags, of which those that only preparing takes are as the data were prepared."""
    from llama3 import data

    known = data.read_preparation(args.dataset_path)
    prepared = {name: {**known, **known["settings"]}[name] for name in checks.PREPARED_WITH}
    return chosen(args, *flags.FLAGS) | prepared


def save_flags(args, values: dict) -> None:
    """Writes config.yaml beside the metrics and the checkpoints: --config=<that file> repeats the run."""
    from trainer.folders import FLAGS_FILE

    for folder in (args.log_dir, args.save_dir):
        flagfile.write(Path(folder, FLAGS_FILE), flags.repeatable(values, args.demo))


def split_arguments(args, vocab_size: int) -> tuple[dict, dict]:
    """The arguments that open the training set and the validation set; the latter's are empty if it is."""
    from llama3 import data

    common = dict(dataset_path=args.dataset_path, max_seq_len=args.max_seq_len, vocab_size=vocab_size)
    validation = dict(split="validation", max_samples=args.max_val_samples, **common)
    return dict(split="train", **common), validation if len(data.open_split(**validation)) else {}


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


def logs(args) -> list:
    """The loggers: metrics.jsonl, what a person sees, and those of --report_to."""
    from trainer import loggers
    from trainer.args import LogConfig

    where = dict(log_dir=args.log_dir)
    found = [LogConfig(loggers.JsonlLogger, where)]
    found += [LogConfig(loggers.Progress, dict(last_step=args.max_train_steps))]
    for name in reporters(args):
        about = {} if name == "tensorboard" else dict(config=chosen(args, *flags.FLAGS))
        found.append(LogConfig(loggers.REPORTERS[name], where | about))
    return found


# ---------------------------------------------------------------- after training


def evaluate(args) -> None:
    """Prints the validation loss in nats per target, and before it, where it can, bits per byte of text."""
    from llama3 import assets, data
    from trainer.loggers import perplexity

    with joined(args):
        trainer, _ = build_trainer(args)
        val_loss = trainer.evaluate()
    if not is_first_rank():
        return
    try:
        path = trainer.args.dataset.val_args["dataset_path"]
        tokenizer = assets.load_tokenizer(data.read_preparation(path)["tokenizer_id"])
        data.check_prepared(path, tokenizer)
        print(f"bits_per_byte={data.bits_per_byte(trainer.val_set, tokenizer, val_loss):.6f}")
    except Exception as error:  # the loss below is what was asked for
        logger.warning("WARNING: no bits per byte: %s", error)
    print(f"val_loss={val_loss:.6f} perplexity={perplexity(val_loss):.6f}")


def merge(args) -> None:
    from trainer import engine

    began, source = time.perf_counter(), Path(args.merge_checkpoint or f"{args.save_dir}/last")
    merged = Path(args.output_path or f"{args.save_dir}/merged.ckpt")
    engine.open_checkpoint(source).merge(merged)
    size, seconds = merged.stat().st_size / 2**30, time.perf_counter() - began
    print(f"merged {source} into {merged}: {size:.2f} GiB in {seconds:.1f} s")
    report.say_next(report.repeated(args, export_hf=merged))


def export(args) -> None:
    source = Path(args.export_hf or f"{args.save_dir}/last")
    folder = Path(args.output_path or f"{args.save_dir}/hf")
    _, is_chat = exporting.export_checkpoint(args, source, folder, args.export_dtype)
    print(
        f"exported {source.resolve()} to {folder}: AutoModelForCausalLM.from_pretrained('{folder}') loads it"
    )
    use = dict(chat=True) if is_chat else dict(generate="Once upon a time")
    report.say_next(report.command(use | dict(model_id=folder)))


def export_adapter(args) -> None:
    from llama3 import adapters
    from trainer.tensorfile import TensorFileWriter

    folder = Path(args.output_path or f"{args.save_dir}/adapter")
    source, resolved = exporting.open_exported(args, Path(args.export_adapter or f"{args.save_dir}/last"))
    if not (found := settings.lora(resolved)):
        raise ValueError(f"{source.path} is of a whole model, not of an adapter: {checks.WHOLE_FIX}")
    adapters.export_adapter(
        folder, resolved.model_id, found, source.shapes, source.parameters(), TensorFileWriter
    )
    print(f"exported {source.path} to {folder}: PeftModel.from_pretrained(model, '{folder}') loads it")
    report.say_next(report.repeated(args, export_hf=args.export_adapter or True))


def generate(args) -> None:
    from llama3 import sample

    model, tokenizer, is_chat = exporting.open_model(args)
    how = args.max_new_tokens or 64, args.seed, args.temperature
    print(sample.generate_text(model, tokenizer, args.generate, *how, is_chat))


def chat(args) -> None:
    from llama3 import sample

    model, tokenizer, _ = exporting.open_model(args)
    logger.info("chat: /exit, Ctrl-D or Ctrl-C leaves")
    sample.chat(model, tokenizer, args.max_new_tokens or 512, args.seed, args.temperature)


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

MODES = {
    "prepare_data": prepare,
    "train": train,
    "evaluate": evaluate,
    "merge_checkpoint": merge,
    "export_hf": export,
    "export_adapter": export_adapter,
    "generate": generate,
    "chat": chat,
    "plan": planning.show,
    "doctor": diagnosing.show,
    "verify_resume": verify_resume,
}


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C, 143 by SIGTERM after a save."""
    level = logging.INFO if is_first_rank() else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    logging.captureWarnings(True)  # once, from rank 0, and above the progress bar
    for noisy in ("httpx", "httpx2", "datasets", "torch.distributed", "nnscaler"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # of selective recompute
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # prints text of any language on any terminal
    try:
        machine.provide_home()
        args = flags.parse_args_together(argv, __doc__)
        if args.mode not in ("train", "evaluate", "doctor") and world_size() > 1:
            raise ValueError(f"--{args.mode} runs in one process: start it with python instead of torchrun")
        if args.mode != "train":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # lets clean-up code run
        MODES[args.mode](args)
        return 0
    except ValueError as error:
        logger.debug("traceback:", exc_info=True)
        return complain(str(error), 2)
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        named = isinstance(error, WRONG_PATH) or error.errno == errno.ENAMETOOLONG
        return complain(f"{what}; make room or name a folder that can be written", 2 if named else 1)
    except UserError as error:
        return complain(str(error), 2)
    except TrainingFailed as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        if is_first_rank():
            print("train.py: stopped; the same command begins again, or continues", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
            lower = "a lower --mem_constraint, --micro_batch_size or --max_seq_len"
            fix = f"use --recompute=full, {lower}, --lora_rank, or more GPUs"
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
