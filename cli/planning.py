"""The plan of a run: what the planner must know of it, --plan, and the plan that training uses."""

import argparse
import functools
import hashlib
import json
import logging
import os
from pathlib import Path

from cli import checks, settings
from cli.flags import ACCUMULATION, FLAGS
from errors import TrainingFailed
from trainer.args import derive_batch_sizes

logger = logging.getLogger(__name__)


def show(args) -> None:
    """Prints the plans for devices that need not be here, and what else would fit; fails if none fits."""
    import torch

    from trainer import devices, measure, planner

    if args.resume_from:
        raise ValueError("--plan plans what the flags say, not a checkpoint: leave --resume_from out")
    if (ranks := args.world_size or planner.NODE_DEVICES) > planner.MOST_DEVICES:
        raise ValueError(f"--world_size {ranks}: give at most {planner.MOST_DEVICES} devices")
    kind, device = args.device_type, devices.parse_device(args.device_type, ranks)
    here = devices.preferred_precision(torch.device("cpu"))
    args = settings.with_precision(args, here if kind == "cpu" else "bf16")
    run = planner_run(args, device, ranks, planner.NODE_DEVICES, kind == "cpu", {})
    checks.say_recompute(args, run.layers)
    plans = planner.search(run)
    if args.output_path:
        Path(args.output_path).write_text(json.dumps(planner.as_json(plans), indent=1))
    size = f"{run.global_batch_size} x {args.max_seq_len} tokens a step in {args.precision}"
    print(f"{args.model_id}, {size}, on {ranks} x {kind} with {run.limit_gib:.1f} GiB for tensors")
    print(planner.table(run, plans, args.max_train_steps))
    if not plans[0].fits:
        raise TrainingFailed(f"no plan fits: use {planner.what_would_fit(run)}")
    longest, made_for = planner.longest_sequence(run), measure.facts(run.model)["longest_sample"]
    more = " or more" if longest == planner.LONGEST else ""
    known = f" (the model was made for {made_for})" if longest > made_for else ""
    print(f"the longest sequence that fits: {longest}{more} tokens{known}")
    print(f"the fewest devices that fit: {planner.fewest_devices(run)}")


def planned(args, state: dict):
    """The flags with what the plan for the devices at hand says, and the plan, None if there is none.

    Raises ValueError if the model cannot fit.
    """
    run = at_hand(args, settings.world_size(), state)
    warn_about_memory(run)
    if not (best := fitting(args, run)):
        return args, None
    sizes = dict(micro_batch_size=best.micro_batch_size, global_batch_size=run.global_batch_size)
    return argparse.Namespace(**vars(args) | sizes), best


def warn_about_memory(run) -> None:
    """Warn of a run on a CPU whose state alone exceeds the memory that is free: the kernel would kill it."""
    from trainer import machine, planner

    if not run.on_cpu:
        return
    shards = run.ranks // run.pinned.get("dp_replicate", 1)
    state = planner.state(run, shards) * run.node_ranks
    free = machine.memory().free
    if state > free:
        logger.warning(
            "WARNING: weights, gradients and AdamW take %.1f GiB of this machine's memory, and %.1f GiB are "
            "free. The kernel may kill the run: stop other programs, or train a smaller model.",
            state / planner.GIB,
            free / planner.GIB,
        )


def at_hand(args, ranks: int, state: dict):
    """What the planner must know of a run on so many devices of the kind that is here."""
    from trainer import devices, parallel

    device, node_ranks = parallel.pick_device(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    kind, on_cpu = devices.at_hand(device, node_ranks), device.type == "cpu"
    return planner_run(args, kind, ranks, node_ranks, on_cpu, state)


def fitting(args, run):
    """The best plan, which it logs; None: the flags lay the run out. ValueError if the model cannot fit."""
    from trainer import measure, planner

    planner.check_state(run, args.model_id)
    if args.pas_policy != "autodist":
        return None
    try:
        # A CPU's run starts at once: it plans with what --plan measured before.
        best = planner.choose(run, measure_now=not run.on_cpu)
    except measure.NotMeasured:
        how = f"python train.py --plan --device_type=cpu --world_size={run.ranks}"
        logger.info("plan: as the flags say; %s and these flags would predict its memory", how)
        return None
    for line in planner.explain(run, best):
        logger.info("plan: %s", line)
    if not best.fits:
        planner.refuse(run, best)
    return best


def planner_run(args, device, ranks: int, node_ranks: int, on_cpu: bool, state: dict):
    """What the planner must know of a run on these devices. A flag that is given pins what it names."""
    from trainer import planner

    settings.check_replicas(args, ranks)
    if args.mem_constraint and args.mem_constraint > device.memory_gib:
        has = f"--mem_constraint {args.mem_constraint:g}: the device has {device.memory_gib:.1f} GiB"
        raise ValueError(f"{has}: give less, or leave it out")
    sizes, micro = settings.batch_sizes(args, state), args.micro_batch_size
    total, _ = derive_batch_sizes(micro, ranks, *map(sizes.get, ("global_batch_size", ACCUMULATION)))
    given = args.given.keys() & {"micro_batch_size", ACCUMULATION} or micro != FLAGS["micro_batch_size"][0]
    pinned = dict(recompute=settings.recompute_mode(args), dp_replicate=args.dp_replicate)
    pinned |= dict(micro_batch_size=micro if given else None)
    if on_cpu:  # where these save no time, and one rank has nothing to gather
        pinned |= dict(micro_batch_size=micro, dp_replicate=args.dp_replicate or 1)
        pinned |= dict(reshard_after_forward=False) if ranks == 1 else {}
    return planner.Run(
        model=measured(settings.model_arguments(args), args.max_seq_len, args.precision),
        device=device,
        on_cpu=on_cpu,
        limit_gib=args.mem_constraint or (device.memory_gib if on_cpu else planner.usable_gib(device)),
        ranks=ranks,
        node_ranks=min(ranks, node_ranks),
        global_batch_size=total,
        micro_batch_size=micro,
        pinned={name: value for name, value in pinned.items() if value not in (None, "auto")},
        pretrained=not args.from_scratch,
        compiled=settings.compiles(args, not on_cpu),
    )


def measured(arguments: dict, tokens: int, precision: str):
    """The Llama of these arguments on rows of so many tokens, for `measure`."""
    from trainer import measure

    make, batch = functools.partial(make_llama, arguments), functools.partial(empty_batch, tokens)
    return measure.Model(key=model_key(arguments), make=make, batch=batch, tokens=tokens, precision=precision)


def make_llama(arguments: dict, num_layers: int | None):
    from llama3.model import Llama

    return Llama(**arguments | ({"num_hidden_layers": num_layers} if num_layers else {}))


def empty_batch(length: int, rows: int) -> dict:
    from llama3.data import Collator

    return Collator(length, rows)([dict(input_ids=[0] * length, document_starts=[0])] * rows)


def model_key(arguments: dict) -> str:
    """Tells apart what a measurement depends on: the model, our code, and the libraries."""
    from importlib.metadata import version

    config, here = Path(arguments["model_id"], "config.json"), Path(__file__).parents[1]
    files = sorted([*here.glob("llama3/*.py"), *here.glob("trainer/*.py")])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    model = config.read_text() if config.is_file() else ""
    kept = {name: value for name, value in arguments.items() if name != "seed"}
    return json.dumps([model, kept, code.hexdigest(), version("torch"), version("transformers")])
