"""The flags as arguments of the model, the batch and the engine, with what the machine decides."""

import functools
import logging
import math
import os
from typing import TYPE_CHECKING, Any

from cli.config import FLAGS, LORA, MODES, Command, Config, Origin
from errors import UserError

if TYPE_CHECKING:
    from plan.planner import Plan
    from trainer.args import Layout, NativeOptions

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- ranks


def is_first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def compared(config: Config) -> dict[str, Any]:
    """Return the flags that all ranks must have in common: all but the folders that rank 0 alone writes."""
    alone = ("config", "save_dir", "log_dir")
    return {f"--{name}": getattr(config, name) for name in FLAGS if name not in alone}


# ---------------------------------------------------------------- model and batch


def model_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of llama3.model.Llama."""
    arguments = config.select("model_id", "from_scratch", "num_hidden_layers", "seed")
    arguments["lora"] = lora_arguments(config)
    return arguments


def lora_arguments(config: Config) -> dict[str, Any] | None:
    """Return the arguments of adapters.lora_config; None: the whole model is trained."""
    if config.lora_rank is None:
        return None
    return config.select(*LORA)


def batch_sizes(command: Command, resumed_state: dict[str, Any]) -> dict[str, int]:
    """Return the batch flags that decide: the user's, else the checkpoint's global batch, else the default.

    resumed_state: the state of the resumed checkpoint, empty for a fresh start.
    """
    config = command.config
    if config.mode == "evaluate":
        return {"grad_accumulation_steps": 1}
    names = ("grad_accumulation_steps", "global_batch_size")
    sizes = {name: getattr(config, name) for name in names if command.is_explicit(name)}
    if resumed_state:
        return {"global_batch_size": resumed_state["global_batch_size"], **sizes}
    if sizes:
        return sizes
    if config.global_batch_size:
        return {"global_batch_size": config.global_batch_size}
    return {"grad_accumulation_steps": config.grad_accumulation_steps}


def global_batch(command: Command, ranks: int, resumed_state: dict[str, Any]) -> tuple[int, int]:
    """Return the global batch and the accumulation on that many data-parallel ranks. Raises UserError."""
    from trainer.args import derive_batch_sizes

    sizes = batch_sizes(command, resumed_state)
    return derive_batch_sizes(
        command.config.micro_batch_size,
        ranks,
        sizes.get("global_batch_size"),
        sizes.get("grad_accumulation_steps"),
    )


def last_step(config: Config, samples: int, batch: int) -> int:
    """Return the step at which the run ends: the earlier of --max_train_steps and --max_epochs.

    samples: of the training set. batch: the samples of an optimizer step.
    """
    ends = []
    if config.max_train_steps is not None:
        ends.append(config.max_train_steps)
    if config.max_epochs is not None:
        ends.append(math.ceil(config.max_epochs * samples / batch))
    return min(ends)


def check_replicas(config: Config, ranks: int) -> None:
    """Raise UserError if the replicas do not divide the ranks."""
    if config.dp_replicate and ranks % config.dp_replicate:
        raise UserError(
            f"--dp_replicate={config.dp_replicate} does not divide {ranks} ranks",
            "Give a number that divides the ranks",
        )


def partitioning_flags(config: Config) -> str:
    """Return the flags that partition the model, which nnScaler alone can; empty without any."""
    flags = []
    if config.plan_ngpus > 1:
        flags.append(f"--plan_ngpus={config.plan_ngpus}")
    if config.pas_policy == "tp":
        flags.append("--pas_policy=tp")
    return " ".join(flags)


# ---------------------------------------------------------------- precision and compile


def resolve_precision(command: Command, preferred: str) -> Command:
    """Return the command with `preferred` in the place of --precision=auto."""
    if command.config.precision == "auto":
        return command.replace(precision=preferred)
    return command


def warn_about_slow_bf16(config: Config) -> None:
    """Warn, from rank 0, of a run in bf16 on a device that does not compute in it."""
    from trainer import machine, parallel

    device = parallel.pick_device()
    if config.precision == "bf16" and not machine.computes_in_bf16(device):
        reason = machine.slow_bf16_reason(device)
        logger.warning("--precision=bf16, but %s. Go on in fp32 with --precision=fp32.", reason)


def compiles(config: Config, on_cuda: bool) -> bool:
    """Return whether our engine compiles on such a device, training and --evaluate alike."""
    if config.compile != "auto":
        return config.compile == "on"
    return on_cuda or (config.demo and can_compile())


@functools.cache
def can_compile() -> bool:
    """Return whether torch.compile can build for this CPU; log the reason if not."""
    from trainer import machine

    problem = machine.compiler_problem()
    if problem:
        logger.info("--demo runs without torch.compile, a third slower: %s", problem)
    return problem is None


def resolve_compile(command: Command, engine_name: str) -> Command:
    """Return the command with on or off for --compile. Raises UserError if the user's `on` cannot work.

    A checkpoint's `on` becomes `off`, with a warning, where the machine has no compiler.
    """
    import torch

    from trainer import machine

    config = command.config
    on_cuda = torch.cuda.device_count() > 0
    if engine_name == "nnscaler":  # it does not compile
        return command.replace(compile="off") if config.compile == "auto" else command
    if config.compile == "auto":
        return command.replace(compile="on" if compiles(config, on_cuda) else "off")
    if config.compile == "off" or on_cuda:
        return command
    problem = machine.compiler_problem()
    if problem is None:
        return command
    if command.origins["compile"] == Origin.CHECKPOINT:
        logger.warning("the checkpoint's run was compiled, and this one is not: %s", problem)
        return command.replace(compile="off")
    raise UserError(
        f"--compile=on needs a C++ compiler that works ({problem})",
        "Install g++ and python3-dev, or use --compile=off",
    )


# ---------------------------------------------------------------- layout and engine


def layout(config: Config, engine_name: str, plan: "Plan | None", accumulation: int) -> "Layout":
    """Return how the run lies over its ranks: as the plan says, or without one as the flags say.

    accumulation: what follows from the batch flags. --compile must be resolved.
    """
    import torch

    from trainer.args import Layout

    compiled = config.compile == "on"
    ranks = world_size()
    if plan:
        return Layout(
            dp_shard=plan.dp_shard,
            dp_replicate=plan.dp_replicate,
            recompute=plan.recompute,
            reshard_after_forward=plan.reshard_after_forward,
            micro_batch_size=plan.micro_batch_size,
            grad_accumulation_steps=plan.grad_accumulation_steps,
            compile=compiled,
            predicted_peak_gib=plan.predicted_peak_gib,
        )
    check_replicas(config, ranks)
    replicas = config.dp_replicate or 1
    on_cuda = torch.cuda.device_count() > 0
    recompute = config.recompute_mode
    if recompute == "auto":
        recompute = "full" if on_cuda and _can_recompute(config, engine_name) else "none"
    return Layout(
        dp_shard=ranks // replicas,
        dp_replicate=replicas,
        recompute=recompute,
        reshard_after_forward=on_cuda or ranks > 1,
        micro_batch_size=config.micro_batch_size,
        grad_accumulation_steps=accumulation,
        compile=compiled,
    )


def _can_recompute(config: Config, engine_name: str) -> bool:
    return engine_name == "native" or config.pas_policy == "autodist"  # nnScaler's 'dp' cannot


def engine_options(config: Config, engine_name: str, run_layout: "Layout") -> "NativeOptions":
    """Return the options that nnScaler's interface has no field for."""
    import torch

    from plan import devices
    from trainer import parallel
    from trainer.args import NativeOptions

    device = devices.of(parallel.pick_device())
    saves_in_background = config.async_save == "on"
    if config.async_save == "auto":
        saves_in_background = torch.cuda.device_count() > 0 and engine_name == "native"
    return NativeOptions(
        layout=run_layout,
        async_save=saves_in_background,
        validate_first=config.demo,
        device_tflops=device.tflops if device else None,
        **config.select(
            "deterministic",
            "max_skipped_steps",
            "timeout_seconds",
            "mem_constraint",
            "save_every_n_minutes",
        ),
    )


def warn_about_changed_layout(run_layout: "Layout", state: dict[str, Any]) -> None:
    """Log each part of the layout that differs from that of the run which a resume continues.

    state: the resumed checkpoint's, empty for a fresh start.
    """
    for name, before in state.get("layout", {}).items():
        value = getattr(run_layout, name, before)
        if value != before and name != "predicted_peak_gib":
            logger.warning(
                "%s is %s, and was %s: results may differ from the run's in the last bits",
                name,
                value,
                before,
            )


def resume_flags(command: Command, state: dict[str, Any]) -> Command:
    """Return the command with the flags of the checkpoint's run, and log each that differs.

    Logs what the user's flags change, and what the run takes instead of its default.
    """
    saved = state.get("config", {})
    resumed = command.resumed(saved)
    for name, origin in resumed.origins.items():
        if name in MODES or name not in saved or not FLAGS[name].resumed:
            continue
        value = getattr(resumed.config, name)
        without = getattr(command.config, name)
        if origin >= Origin.FILE and value != saved[name]:
            logger.info("--%s=%s, the checkpoint's run had %s", name, _text(value), _text(saved[name]))
        elif origin < Origin.FILE and without not in (value, "auto"):
            logger.info(
                "--%s=%s, as the checkpoint's run (without it: %s)", name, _text(value), _text(without)
            )
    return resumed


def _text(value: Any) -> Any:
    return "not given" if value is None else value
