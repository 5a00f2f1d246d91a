"""What the flags mean for the model, the batch and the engine."""

import argparse
import functools
import logging
import os

from cli.flags import LORA, chosen
from errors import UserError

logger = logging.getLogger(__name__)


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def with_precision(args, preferred: str) -> argparse.Namespace:
    """Return the flags with `preferred` in the place of --precision=auto."""
    if args.precision == "auto":
        return argparse.Namespace(**vars(args) | {"precision": preferred})
    return args


def warn_about_slow_bf16(args) -> None:
    """Warn, from rank 0, of a run in bf16 on a device that does not compute in it."""
    from trainer import devices, parallel

    device = parallel.pick_device()
    if args.precision == "bf16" and not devices.computes_in_bf16(device):
        reason = devices.slow_bf16_reason(device)
        logger.warning("WARNING: --precision=bf16, but %s. Go on in fp32 with --precision=fp32.", reason)


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


def check_compiler(args) -> None:
    """Raise UserError if --compile=on cannot work on this CPU."""
    import torch

    from trainer import machine

    if args.compile != "on" or torch.cuda.device_count() > 0:
        return
    problem = machine.compiler_problem()
    if problem:
        raise UserError(
            f"--compile=on needs a C++ compiler that works ({problem})",
            "Install g++ and python3-dev, or use --compile=off",
        )


@functools.cache
def can_compile() -> bool:
    """Does this machine have what torch.compile needs on a CPU? Says so if not."""
    from trainer import machine

    problem = machine.compiler_problem()
    if problem:
        logger.info("--demo runs without torch.compile, a third slower: %s", problem)
    return problem is None
