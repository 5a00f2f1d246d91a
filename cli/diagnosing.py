"""--doctor: which checks of tools/doctor.py the flags ask for, on this machine and over torchrun's ranks."""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cli import checks, planning, settings
from errors import TrainingFailed
from llama3 import presets

SAMPLES = 64  # whose labels are compared
GROUP_SECONDS = 300  # how long ranks wait for one that does not answer


def show(args) -> None:
    """Prints a line for each check; TrainingFailed if one finds a fault.

    Under torchrun, each node's first rank checks its machine, and all ranks their group.
    """
    from tools import doctor

    if args.resume_from:
        raise ValueError("--doctor checks what the flags say, not a checkpoint: leave --resume_from out")
    several, first = settings.world_size() > 1, settings.is_first_rank()
    checks_here = [machine_checks(args)] if os.environ.get("LOCAL_RANK", "0") == "0" else []
    with contextlib.ExitStack() as group:
        if several:
            from trainer import ranks

            group.enter_context(ranks.process_group(GROUP_SECONDS // 20))  # which waits 20 times that
        found = []
        for name, check in (pair for pairs in checks_here for pair in pairs):
            found.append(doctor.examine(name, check))
            if first:
                print(found[-1], flush=True)
        if several:
            shared = [doctor.examine(*pair) for pair in group_checks(args)]
            host = os.uname().nodename
            named = [finding._replace(check=f"{finding.check} on {host}") for finding in found]
            nodes = ranks.gathered(named)
            others = [finding for node in nodes[1:] for finding in node]
            shown = shared + [finding for finding in others if finding.status != "ok"]
            found = (found if first else nodes[0]) + shared + others
            if first:
                print(*shown, sep="\n", flush=True)
    status = max((finding.status for finding in found), key=doctor.STATUSES.index)
    if first and args.output_path:
        rows = {"status": status, "checks": [finding._asdict() for finding in found]}
        Path(args.output_path).write_text(json.dumps(rows, indent=1))
    if faults := [finding.check for finding in found if finding.status == "fault"]:
        raise TrainingFailed(f"--doctor finds faults ({', '.join(faults)}): mend them, and run it again")


def machine_checks(args) -> Iterator[tuple[str, Callable]]:
    """Names and checks, one after the other: what a check finds decides which others follow."""
    from tools import doctor

    with_nnscaler = importlib.util.find_spec("nnscaler") and args.engine != "native"
    tested = "requirements-nnscaler.txt" if with_nnscaler else "requirements.txt"
    yield "versions", partial(doctor.versions, doctor.ROOT / tested)
    yield "devices", doctor.devices
    if "torch" not in sys.modules:  # it cannot be imported, and nothing else works
        return
    gpus = sys.modules["torch"].cuda.device_count()
    yield "compiler", partial(doctor.compiler, args.compile == "on" or (args.compile == "auto" and gpus > 0))
    yield "host_name", doctor.host_name
    if settings.world_size() == 1:
        yield "collectives", partial(doctor.collectives, gpus or 2)
    yield "hub", partial(doctor.hub, hub_files(args))
    known = {}  # what the checks of model and data add
    yield "model", partial(check_model, args, known)
    if run := known.get("run"):
        yield "memory", lambda: doctor.memory(*host_memory(args, run))
        yield "disk", lambda: doctor.disk(Path(args.save_dir), *checkpoints(args, run))
    if "config" in known:
        yield "data", partial(check_data, args, known)
    if "collate" in known:
        yield "labels", lambda: doctor.labels(known["rows"], known["collate"], known["ends"])
        yield "sample", lambda: ("ok", json.dumps(known["text"], ensure_ascii=False), "")


def group_checks(args) -> Iterator[tuple[str, Callable]]:
    """What all ranks of torchrun check together."""
    from tools import doctor

    yield "collectives", lambda: ("ok", doctor.measure_collectives(), "")
    yield "nodes", partial(check_nodes, args)
    yield "clocks", doctor.clocks


def check_nodes(args) -> tuple[str, str, str]:
    from tools import doctor
    from trainer import ranks

    versions = doctor.installed(doctor.ROOT / "requirements.txt")
    ranks.compare({name: version for name, (_, version) in versions.items()} | settings.compared(args))
    return "ok", f"all {settings.world_size()} ranks have the same flags and versions", ""


def hub_files(args) -> dict[str, str]:
    """The repositories on the hub that the run reads, and a file of each."""
    wanted = {args.model_id: "config.json"}
    if args.from_scratch and args.model_id in presets.CONFIGS:
        wanted = {}
    wanted = {args.tokenizer_id: "tokenizer.json"} | wanted
    is_hub_id = re.compile(r"[^./~][^/]*/[^/]+").fullmatch
    return {name: file for name, file in wanted.items() if is_hub_id(name) and not Path(name).exists()}


def check_model(args, known: dict) -> tuple[str, str, str]:
    """Does the model fit the devices? From its configuration alone."""
    import torch

    from llama3 import assets
    from trainer import devices, parallel, planner

    args = settings.with_precision(args, devices.preferred_precision(parallel.pick_device()))
    known["config"] = assets.load_config(args.model_id, args.num_hidden_layers)
    ranks = settings.world_size() if settings.world_size() > 1 else max(1, torch.cuda.device_count())
    known["run"] = run = planning.at_hand(args, ranks, {})
    plan = planning.fitting(args, run)
    state = planner.state(run, ranks // (args.dp_replicate or 1)) / planner.GIB
    alone = f"its state takes {state:.2f} of {run.device.memory_gib:.1f} GiB"
    fits = planner.explain(run, plan)[1] if plan else alone
    return "ok", f"{args.model_id}: {planner.trained(run):,} parameters train; ranks: {ranks}; {fits}", ""


def host_memory(args, run) -> tuple[int, str, str]:
    """What the run takes of a host's memory, and what for: on a CPU its state, on CUDA a copy; the fix."""
    from trainer import planner

    nodes = -(-run.ranks // run.node_ranks)
    if run.on_cpu:
        size = int(planner.state(run, run.ranks) * run.node_ranks)
        return size, "weights, gradients and AdamW take", "stop other programs, or train a smaller model"
    size = 12 * planner.trained(run) // nodes if args.async_save != "off" else 0
    return size, "a save in the background takes", "--async_save=off"


def checkpoints(args, run) -> tuple[int, int]:
    """The bytes of a checkpoint, and how many of them there will be."""
    from llama3 import data
    from trainer import planner

    found, steps = data.read_preparation(args.dataset_path), args.max_train_steps
    every, keep = args.save_every_n_train_steps, args.keep_last_n_checkpoints
    if not every:  # each epoch's end saves, as far as that is known
        every = (found["samples"]["train"] if found else math.inf) / run.global_batch_size
    saves = max(1, math.ceil(steps / every))
    # Beside those that are kept, there are the best one and the one that is being written.
    count = min(saves, keep + 2) if keep else saves
    return 12 * planner.trained(run), count  # weights and two moments in fp32


def check_data(args, known: dict) -> tuple[str, str, str]:
    """Are the prepared data whole, and what the flags ask for?"""
    from llama3 import assets, data, export

    config = known["config"]
    _, samples = checks.check_data(args, config, {})
    if settings.world_size() > 1:  # then that read this rank's share of the files
        data.verify(args.dataset_path)
    tokenizer, size = assets.load_tokenizer(args.tokenizer_id), args.max_seq_len
    known["ends"] = {*(export.generation_config(config, tokenizer).eos_token_id or ())}
    known["rows"] = data.open_split(args.dataset_path, "train", size, config.vocab_size, max_samples=SAMPLES)
    known["collate"] = data.Collator(size, 1)
    known["text"] = tokenizer.decode(known["rows"][0]["input_ids"][:32])
    return "ok", f"{args.dataset_path}: {samples:,} samples of {size} tokens, all files as prepared", ""
