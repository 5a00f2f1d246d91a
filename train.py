"""Train and fine-tune Llama 3 on as many GPUs as there are, with one script.

python train.py --prepare_data --demo                   prepare the data once
torchrun --nproc_per_node=2 train.py --demo             train on two ranks (plain python: on one)
torchrun --nproc_per_node=2 train.py --demo --resume_from=last --max_train_steps=100
python train.py --demo --merge_checkpoint               one file from the shards
python train.py --demo --export_hf                      a Hugging Face folder

`--mini` instead of `--demo`, or neither, is the Llama 3 recipe on GPUs. torchrun's --nnodes adds machines.
"""

import argparse
import logging
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from llama3 import presets
from trainer.args import TrainingFailed

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
    "save_dir": ("./checkpoints", path, "folder of the checkpoints"),
    "log_dir": ("./runs/llama3_demo", path, "folder of metrics.jsonl, TensorBoard events, curves.png"),
    "output_path": (None, path, "where --merge_checkpoint or --export_hf writes"),
    "export_dtype": (None, ["bf16", "fp32"], "default: the training precision"),
    "max_new_tokens": (64, (int, 1), "length of --generate's sample"),
    "world_size": (None, (int, 1), "ranks of --verify_resume; default: the CUDA devices here, or 2"),
    "engine": ("auto", ["auto", "nnscaler", "native"], "auto: nnscaler if it is installed and CUDA is there"),
    "pas_policy": ("autodist", ["autodist", "dp"], "how the engine plans the parallelism"),
    "recompute": ("auto", str, "none, full, or a number of layers; auto: full on CUDA"),
    "compile": ("auto", ON_OFF, "torch.compile each layer; auto: on with CUDA"),
}


class Parser(argparse.ArgumentParser):
    """Raises its errors as ValueErrors, so that main prints them once for all ranks."""

    def error(self, message: str):
        raise ValueError(f"{message} (python train.py --help lists the flags)")


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
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
        group.add_argument(f"--{name}", default=default, help=text + shown, **reading)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Defaults, then the preset, then the explicit flags, which `given` holds alone."""
    parser, unset = build_parser(), object()
    empty = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    found = vars(parser.parse_args(argv, empty))
    given = {name: value for name, value in found.items() if value is not unset}
    for preset in PRESETS.keys() & given.keys():
        parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    args.given, args.mode = given, next((mode for mode in MODES if mode in given), "train")
    args.from_scratch |= args.num_hidden_layers is not None
    if args.tokenizer_id is None:
        # The default model's tokenizer is gated on the hub; training from scratch needs no access to it.
        gated = args.from_scratch and args.model_id == presets.LLAMA3_8B
        args.tokenizer_id = "llama3" if gated else args.model_id
    if args.dataset_path is None:
        args.dataset_path = f"./{dataset_name(args.dataset_id)}-{args.max_seq_len}"
    check_values(args)
    return args


def dataset_name(dataset_id: str) -> str:
    """bookcorpus/bookcorpus -> bookcorpus, ./texts/*.txt -> texts, books.jsonl.gz -> books."""
    parts = [part for part in Path(dataset_id).parts if not set(part) & set("*?[")]
    return (parts or ["data"])[-1].split(".")[0] or "data"


def check_values(args) -> None:
    """Raises one ValueError that lists every flag with a wrong value."""
    problems = []
    for name, (_, kind, _) in FLAGS.items():
        value = getattr(args, name)
        if isinstance(kind, tuple) and value is not None and not value >= kind[1]:
            problems.append(f"--{name} {value}: at least {kind[1]} is needed")
    if not args.validation_fraction < 1:
        problems.append(f"--validation_fraction {args.validation_fraction}: a share below 1 is needed")
    if args.recompute not in ("auto", "none", "full") and not args.recompute.isdecimal():
        problems.append(f"--recompute {args.recompute}: give auto, none, full, or a number of layers")
    if problems:
        raise ValueError("\n".join(problems))


# ---------------------------------------------------------------- prepare


def prepare(args) -> None:
    from llama3 import assets, data

    source = chosen(args, "dataset_id", "text_column", "skip_bad_samples")
    samples = chosen(args, "dataset_path", "max_seq_len", "validation_fraction", "seed")
    data.prepare(tokenizer=assets.load_tokenizer(args.tokenizer_id), **source, **samples)


def chosen(args, *names: str) -> dict:
    """These flags as keyword arguments."""
    return {name: getattr(args, name) for name in names}


# ---------------------------------------------------------------- train


def train(args) -> None:
    build_trainer(args).run()


def build_trainer(args):
    """The Trainer of this run. Raises every error that can be detected before the process group starts."""
    from llama3 import assets, data
    from trainer import engine
    from trainer.saver import check_folder

    engine_name = engine.choose(args.engine) if args.mode == "train" else "native"
    resumed = engine.resume_state(args.resume_from, args.save_dir, engine_name)
    if args.mode == "evaluate" and args.resume_from and not resumed:
        raise ValueError(f"--resume_from={args.resume_from}: no such checkpoint in {args.save_dir}")
    config = assets.load_config(args.model_id, args.num_hidden_layers)
    if not args.from_scratch and not resumed:
        assets.weight_files(args.model_id)  # downloads them now, so that no rank waits for it later
    train_args = trainer_args(args, config, resumed)
    samples, needed = len(data.open_split(**train_args.dataset.train_args)), train_args.global_batch_size
    inputs = [args.model_id, args.tokenizer_id, args.dataset_path]
    for folder in (args.save_dir, args.log_dir) if args.mode == "train" else ():
        check_folder(Path(folder), inputs, resumed is not None)
    if args.mode == "train" and samples < needed:
        fix = "prepare more text, or lower --global_batch_size or --grad_accumulation_steps"
        has = f"{args.dataset_path} has {samples} training samples, a global batch {needed}"
        raise ValueError(f"{has}: {fix}")
    if args.mode == "evaluate" and not train_args.dataset.val_args:
        fix = "prepare it with a larger --validation_fraction"
        raise ValueError(f"{args.dataset_path} has no validation samples: {fix}")
    return engine.trainer_class(engine_name)(train_args=train_args, options=engine_options(args, engine_name))


def trainer_args(args, config, resumed: dict | None):
    """What to train, in nnScaler's terms. resumed: the state of the checkpoint to resume from."""
    import torch

    from llama3 import data, model
    from trainer import args as interface
    from trainer import loggers

    train_set, val_set = split_arguments(args, config.vocab_size)
    llama = chosen(args, "model_id", "from_scratch", "num_hidden_layers", "seed")
    adamw = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    lr_lambda = torch.optim.lr_scheduler.LambdaLR, dict(lr_lambda=schedule(args, resumed))
    flags, collate = chosen(args, *FLAGS), data.Collator(args.max_seq_len, args.micro_batch_size)
    logs, log_dir = (loggers.JsonlLogger, loggers.TensorBoardLogger), dict(log_dir=args.log_dir)
    return interface.TrainerArgs(
        compute_config=interface.ComputeConfig(plan_ngpus=1, runtime_ngpus=world_size()),
        model=interface.ModelConfig(model.Llama, llama),
        optimizer=interface.OptimizerConfig(torch.optim.AdamW, adamw, clip_gnorm=args.clip_gnorm),
        lr_scheduler=interface.LRSchedulerConfig(*lr_lambda),
        dataset=interface.DatasetConfig(data.open_split, train_set, val_set),
        dataloader=interface.DataloaderConfig(dict(collate_fn=collate, pin_memory=torch.cuda.is_available())),
        checkpoint=interface.CheckpointConfig(
            every_n_train_steps=args.save_every_n_train_steps,
            **chosen(args, "save_dir", "keep_last_n_checkpoints", "resume_from"),
        ),
        log=[interface.LogConfig(logger_class, log_dir) for logger_class in logs],
        hook=interface.HookMapConfig(
            # With these, exporting a checkpoint does not need this run's flags.
            on_save_checkpoint=lambda _, state: state.update(config=flags, model=config.to_dict()),
            on_train_end=lambda _: draw_curves(args.log_dir),
        ),
        **batch_sizes(args, resumed),
        **chosen(args, "micro_batch_size", "max_train_steps", "val_every_n_train_steps"),
        **chosen(args, "pas_policy", "precision", "seed"),
    )


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
    names = ("global_batch_size", "grad_accumulation_steps")
    if given := {name: args.given[name] for name in names if name in args.given}:
        return given
    if total := resumed["global_batch_size"] if resumed else args.global_batch_size:
        return {"global_batch_size": total}
    return {"grad_accumulation_steps": args.grad_accumulation_steps}


def engine_options(args, engine_name: str):
    """What --recompute, --compile and the like mean on this engine and device."""
    import torch

    from trainer.args import NativeOptions

    on_cuda = torch.cuda.device_count() > 0
    native = on_cuda and engine_name == "native"  # nnScaler neither compiles nor saves in the background
    on = {"auto": native, "on": True, "off": False}
    recompute = int(args.recompute) if args.recompute.isdecimal() else args.recompute
    if recompute == "auto":  # nnScaler's 'dp' cannot recompute
        recompute = "full" if native or (on_cuda and args.pas_policy == "autodist") else "none"
    options = dict(recompute=recompute, compile=on[args.compile], async_save=on[args.async_save])
    options |= chosen(args, "deterministic", "max_skipped_steps")
    return NativeOptions(validate_first=args.demo, **options)


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


# ---------------------------------------------------------------- after training


def evaluate(args) -> None:
    from trainer.loggers import perplexity

    val_loss = build_trainer(args).evaluate()
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


def export_checkpoint(args, path: Path, folder: Path, dtype: str | None):
    """Writes a checkpoint, tensor by tensor, as a Hugging Face folder; returns its tokenizer."""
    from llama3 import assets
    from llama3.export import export_hf
    from trainer import engine
    from trainer.tensorfile import TensorFileWriter

    source = engine.open_checkpoint(path)
    source.verify()
    state = source.state
    # nnScaler's own demo saves no flags and no configuration: this command's flags must describe its model.
    flags = {**vars(args), **state.get("config", {}), **args.given}
    tokenizer = assets.load_tokenizer(flags["tokenizer_id"])
    config = state.get("model") or assets.load_config(args.model_id, args.num_hidden_layers).to_dict()
    dtype = dtype or state.get("config", {}).get("precision", args.precision)
    export_hf(folder, config, tokenizer, source.shapes, source.parameters(), dtype, TensorFileWriter)
    return tokenizer


def generate(args) -> None:
    from llama3 import assets
    from llama3.export import generate_text

    with tempfile.TemporaryDirectory() as temporary:
        if args.resume_from:
            named = args.resume_from in ("last", "best")
            source = Path(args.save_dir if named else "", args.resume_from)
            folder = Path(temporary, "hf")
            tokenizer = export_checkpoint(args, source, folder, args.precision)
        else:
            assets.weight_files(args.model_id)  # says what is missing
            folder, tokenizer = assets.model_folder(args.model_id), assets.load_tokenizer(args.tokenizer_id)
        length, seed, dtype = args.max_new_tokens, args.seed, args.precision
        print(generate_text(folder, tokenizer, args.generate, length, seed, dtype))


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
    "evaluate": (evaluate, SWITCH, "validation loss of the model, or of --resume_from"),
    "generate": (generate, dict(metavar="PROMPT"), "a sample from the model, or from --resume_from"),
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
    for noisy in ("httpx", "datasets", "torch.distributed", "nnscaler"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # prints text of any language on any terminal
    try:
        args = parse_args(argv)
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
        return complain(f"{what}; make room or name a folder that can be written", 1)
    except TrainingFailed as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        if is_first_rank():
            fix = "the same command continues a preparation, --resume_from=last a training"
            print(f"train.py: stopped; {fix}", file=sys.stderr)
        return 130


def complain(message: str, code: int) -> int:
    """Rank 0 prints; the others wait 20 s for torchrun to stop them, then print too."""
    if not is_first_rank():
        time.sleep(20)
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
