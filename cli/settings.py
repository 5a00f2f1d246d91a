"""What the flags mean for the model, the batch and the engine."""

import functools
import logging
import os
import shutil
import sysconfig
from pathlib import Path

from cli.flags import LORA, chosen

logger = logging.getLogger(__name__)


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def compared(args) -> dict:
    """What all ranks must be started with: the flags, but for the folders that rank 0 alone writes."""
    others = ("given", "typed", "config", "mode", "save_dir", "log_dir")
    return {f"--{name}": value for name, value in vars(args).items() if name not in others}


def model_arguments(args) -> dict:
    """The arguments of llama3.model.Llama."""
    llama = chosen(args, "model_id", "from_scratch", "num_hidden_layers", "seed")
    return llama | dict(lora=lora(args))


def lora(args) -> dict | None:
    """The arguments of adapters.lora_config; None: the whole model is trained."""
    return chosen(args, *LORA) if args.lora_rank else None


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
    options |= chosen(args, "deterministic", "max_skipped_steps", "timeout_seconds", "mem_constraint")
    options |= dict(dp_replicate=args.dp_replicate or 1, reshard_after_forward=on_cuda or world_size() > 1)
    if plan:
        names = "recompute", "dp_replicate", "reshard_after_forward", "predicted_peak_gib"
        options |= {name: getattr(plan, name) for name in names}
    return NativeOptions(validate_first=args.demo, **options)


def partition(args) -> str:
    """The flags that ask to partition the model, which only nnScaler does."""
    flags = [f"--plan_ngpus={args.plan_ngpus}"] * (args.plan_ngpus > 1)
    return " ".join(flags + ["--pas_policy=tp"] * (args.pas_policy == "tp"))


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
