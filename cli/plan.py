"""--plan, and the plan that training uses: the planner's view of a run, from the flags."""

import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import checks, settings
from cli.config import DEFAULTS, Command, Config
from errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from plan.devices import Device
    from plan.measure import Model
    from plan.planner import Plan, Run

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- --plan


def show(command: Command) -> None:
    """Print the plans for devices that need not be here, and what else would fit.

    Raises TrainingFailed if none fits.
    """
    import torch

    from plan import devices, planner
    from trainer import machine

    config = command.config
    ranks = config.world_size or planner.NODE_DEVICES
    if ranks > planner.MOST_DEVICES:
        raise UserError(
            f"--world_size must be <= {planner.MOST_DEVICES} for --plan (got {ranks})",
            "Give fewer devices",
        )
    device = devices.parse_device(config.device_type, ranks)
    on_cpu = config.device_type == "cpu"
    preferred = machine.preferred_precision(torch.device("cpu")) if on_cpu else "bf16"
    command = settings.resolve_precision(command, preferred)
    run = planner_run(command, device, ranks, planner.NODE_DEVICES, on_cpu, {})
    checks.warn_about_recompute(config, run.layers)
    plans = planner.search(run)
    if config.output_path:
        Path(config.output_path).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output_path).write_text(json.dumps(planner.as_json(plans), indent=1))
    size = f"{run.global_batch_size} x {config.max_seq_len} tokens a step in {command.config.precision}"
    limit = f"{ranks} x {config.device_type} with {run.limit_gib:.1f} GiB for tensors"
    print(f"{config.model_id}, {size}, on {limit}")
    print(planner.table(run, plans, config.max_train_steps or DEFAULTS["max_train_steps"]))
    if not plans[0].fits:
        raise TrainingFailed(f"no plan fits: use {planner.what_would_fit(run)}")
    print(_longest_sequence(run))
    print(f"the fewest devices that fit: {planner.fewest_devices(run)}")


def _longest_sequence(run: "Run") -> str:
    from plan import measure, planner

    longest = planner.longest_sequence(run)
    trained_length = measure.facts(run.model)["longest_sample"]
    text = f"the longest sequence that fits: {longest}"
    if longest == planner.LONGEST:
        text += " or more"
    text += " tokens"
    if longest > trained_length:
        text += f" (the model was made for {trained_length})"
    return text


# ---------------------------------------------------------------- the plan of a training


def planned(command: Command, state: dict[str, Any]) -> tuple["Plan", int] | None:
    """Return the plan for the devices of this run and its global batch; None: the flags lay the run out.

    state: the resumed checkpoint's, empty for a fresh start. Raises UserError if the model cannot fit; any
    other failure is a warning.
    """
    try:
        run = run_on_these_devices(command, settings.world_size(), state)
        warn_about_memory(run)
        plan = fitting(command.config, run)
    except UserError:
        raise
    except Exception as error:  # it reads torch's internals, which a release may change
        reason = f"{type(error).__name__}: {error}"
        logger.warning("the planner failed, so that the flags lay the run out: %s", reason)
        return None
    if plan is None:
        return None
    return plan, run.global_batch_size


def warn_about_memory(run: "Run") -> None:
    """Warn of a run on a CPU whose state alone exceeds the memory that is free: the kernel would kill it."""
    from plan import planner
    from trainer import machine

    if not run.on_cpu:
        return
    shards = run.ranks // run.pinned.get("dp_replicate", 1)
    state = planner.state(run, shards) * run.node_ranks
    free = machine.memory().free
    if state > free:
        logger.warning(
            "weights, gradients and AdamW take %.1f GiB of this machine's memory, and %.1f GiB are free. "
            "The kernel may kill the run: stop other programs, or train a smaller model.",
            state / planner.GIB,
            free / planner.GIB,
        )


def run_on_these_devices(command: Command, ranks: int, state: dict[str, Any]) -> "Run":
    """Return the planner's view of the run on that many devices of the kind that is here."""
    from plan import devices
    from trainer import parallel

    device = parallel.pick_device()
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    rates = devices.at_hand(device, node_ranks)
    return planner_run(command, rates, ranks, node_ranks, device.type == "cpu", state)


def fitting(config: Config, run: "Run") -> "Plan | None":
    """Return the best plan and log it; None: the flags lay the run out.

    Raises UserError if the model cannot fit.
    """
    from plan import measure, planner

    planner.check_state(run, config.model_id)
    if config.pas_policy != "autodist":
        return None
    try:
        # A run on a CPU starts at once: it plans with what --plan measured before.
        plan = planner.choose(run, measure_now=not run.on_cpu)
    except measure.NotMeasured:
        predicts = f"python train.py --plan --device_type=cpu --world_size={run.ranks}"
        logger.info("plan: as the flags say; %s and these flags would predict its memory", predicts)
        return None
    for line in planner.explain(run, plan):
        logger.info("plan: %s", line)
    if not plan.fits:
        planner.refuse(run, plan)
    return plan


def planner_run(
    command: Command, device: "Device", ranks: int, node_ranks: int, on_cpu: bool, state: dict[str, Any]
) -> "Run":
    """Return the planner's view of a run on these devices. An explicit flag pins its part of the plan."""
    from plan import planner

    config = command.config
    settings.check_replicas(config, ranks)
    if config.mem_constraint and config.mem_constraint > device.memory_gib:
        raise UserError(
            f"--mem_constraint={config.mem_constraint:g} exceeds the device's {device.memory_gib:.1f} GiB",
            "Give less, or leave it out",
        )
    total, _ = settings.global_batch(command, ranks, state)
    limit_gib = config.mem_constraint
    if limit_gib is None:
        limit_gib = device.memory_gib if on_cpu else planner.usable_gib(device)
    return planner.Run(
        model=measured(settings.model_arguments(config), config.max_seq_len, config.precision),
        device=device,
        on_cpu=on_cpu,
        limit_gib=limit_gib,
        ranks=ranks,
        node_ranks=min(ranks, node_ranks),
        global_batch_size=total,
        micro_batch_size=config.micro_batch_size,
        pinned=_pinned(command, ranks, on_cpu),
        pretrained=not config.from_scratch,
        compiled=settings.compiles(config, not on_cpu),
    )


def _pinned(command: Command, ranks: int, on_cpu: bool) -> dict[str, Any]:
    """Return the fields of a plan that the flags or the device decide."""
    config = command.config
    pinned = {}
    if config.recompute_mode != "auto":
        pinned["recompute"] = config.recompute_mode
    if config.dp_replicate is not None:
        pinned["dp_replicate"] = config.dp_replicate
    is_given = command.is_explicit("micro_batch_size") or command.is_explicit("grad_accumulation_steps")
    if is_given or config.micro_batch_size != DEFAULTS["micro_batch_size"]:
        pinned["micro_batch_size"] = config.micro_batch_size
    if on_cpu:  # where these save no time
        pinned["micro_batch_size"] = config.micro_batch_size
        pinned.setdefault("dp_replicate", 1)
        if ranks == 1:  # which has nothing to gather
            pinned["reshard_after_forward"] = False
    return pinned


# ---------------------------------------------------------------- what is measured


def measured(arguments: dict[str, Any], tokens: int, precision: str) -> "Model":
    """Return the Llama of these arguments on rows of that many tokens, for `plan.measure`."""
    from plan import measure

    return measure.Model(
        key=model_key(arguments),
        make=functools.partial(make_llama, arguments),
        batch=functools.partial(empty_batch, tokens),
        tokens=tokens,
        precision=precision,
    )


def make_llama(arguments: dict[str, Any], num_layers: int | None):
    """Return the model, with that many layers instead of its own if given."""
    from llama3.model import Llama

    if num_layers is None:
        return Llama(**arguments)
    return Llama(**{**arguments, "num_hidden_layers": num_layers})


def empty_batch(length: int, rows: int) -> dict[str, Any]:
    """Return a batch of one document a row."""
    from dataset.batches import Collator

    row = {"input_ids": [0] * length, "document_starts": [0]}
    return Collator(length, rows)([row] * rows)


def model_key(arguments: dict[str, Any]) -> str:
    """Return a text that tells measurements apart: the model, our code, and the libraries."""
    from importlib.metadata import version

    config_file = Path(arguments["model_id"], "config.json")
    model_config = config_file.read_text() if config_file.is_file() else ""
    root = Path(__file__).parents[1]
    sources = sorted([*root.glob("llama3/*.py"), *root.glob("trainer/*.py")])
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    decisive = {name: value for name, value in arguments.items() if name != "seed"}
    return json.dumps([model_config, decisive, code.hexdigest(), version("torch"), version("transformers")])
