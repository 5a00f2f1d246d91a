"""--doctor: which checks of tools/doctor.py the flags ask for, on this machine and over torchrun's ranks."""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cli import checks, plan, settings
from cli.config import DEFAULTS, Command, Config
from errors import TrainingFailed
from llama3 import presets

CHECKED_SAMPLES = 64  # whose labels are compared
GROUP_SECONDS = 300  # how long ranks wait for one that does not answer
HUB_ID = re.compile(r"[^./~][^/]*/[^/]+")


@dataclass
class Findings:
    """Results of the checks of model and data that later checks need; None until their check succeeded."""

    run: Any = None  # a planner.Run
    model_config: Any = None
    rows: Any = None  # of the training set
    collate: Callable | None = None
    end_ids: set[int] = field(default_factory=set)  # tokens that end a text or a turn
    sample_text: str = ""


def show(command: Command) -> None:
    """Print a line for each check. Raises TrainingFailed if one finds a fault.

    Under torchrun, each node's first rank checks its machine, and all ranks their group.
    """
    from tools import doctor

    is_first = settings.is_first_rank()
    with contextlib.ExitStack() as group:
        if settings.world_size() > 1:
            from trainer import ranks

            group.enter_context(ranks.process_group(GROUP_SECONDS // 20))  # which waits 20 times that
            ranks.gathered(None)  # where a rank with wrong flags raises its error
        results = _examine_machine(command, is_first)
        if settings.world_size() > 1:
            results = _examine_group(command, results, is_first)
    status = max((result.status for result in results), key=doctor.STATUSES.index)
    if is_first and command.config.output_path:
        report = {"status": status, "checks": [result._asdict() for result in results]}
        path = Path(command.config.output_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1))
    faults = [result.check for result in results if result.status == "fault"]
    if faults:
        raise TrainingFailed(f"--doctor: checks failed: {', '.join(faults)}")


def _examine_machine(command: Command, prints: bool) -> list:
    """Check this machine, from its first rank; return the doctor's findings."""
    from tools import doctor

    results = []
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return results
    for name, check in machine_checks(command):
        results.append(doctor.examine(name, check))
        if prints:
            print(results[-1], flush=True)
    return results


def _examine_group(command: Command, machine_results: list, prints: bool) -> list:
    """Check what all ranks do together; return the findings of all nodes, the first node's first."""
    from tools import doctor
    from trainer import ranks

    shared = [doctor.examine(name, check) for name, check in group_checks(command.config)]
    host = os.uname().nodename
    named = [result._replace(check=f"{result.check} on {host}") for result in machine_results]
    nodes = ranks.gathered(named)
    of_others = [result for node in nodes[1:] for result in node]
    if prints:
        problems = [result for result in of_others if result.status != "ok"]
        print(*shared, *problems, sep="\n", flush=True)
        return machine_results + shared + of_others
    return nodes[0] + shared + of_others


def machine_checks(command: Command) -> Iterator[tuple[str, Callable]]:
    """Yield names and checks, one after the other: the findings of a check decide which others follow."""
    from tools import doctor

    config = command.config
    with_nnscaler = importlib.util.find_spec("nnscaler") and config.engine != "native"
    requirements = "requirements-nnscaler.txt" if with_nnscaler else "requirements.txt"
    yield "versions", partial(doctor.versions, doctor.ROOT / requirements)
    yield "devices", doctor.devices
    if "torch" not in sys.modules:  # it cannot be imported, and nothing else works
        return
    gpus = sys.modules["torch"].cuda.device_count()
    compiles = config.compile == "on" or (config.compile == "auto" and gpus > 0)
    yield "compiler", partial(doctor.compiler, compiles)
    yield "host_name", doctor.host_name
    if settings.world_size() == 1:
        yield "collectives", partial(doctor.collectives, gpus or 2)
    yield "hub", partial(doctor.hub, hub_files(config))
    findings = Findings()
    yield "model", partial(check_model, command, findings)
    run = findings.run
    if run is not None:
        yield "memory", lambda: doctor.memory(*host_memory(config, run))
        yield "disk", lambda: doctor.disk(Path(config.save_dir), *checkpoints(config, run))
    if findings.model_config is not None:
        yield "data", partial(check_data, command, findings)
    if findings.collate is not None:
        yield "labels", lambda: doctor.labels(findings.rows, findings.collate, findings.end_ids)
        yield "sample", lambda: ("ok", json.dumps(findings.sample_text, ensure_ascii=False), "")


def group_checks(config: Config) -> Iterator[tuple[str, Callable]]:
    """Yield the checks that all ranks of torchrun make together."""
    from tools import doctor

    yield "collectives", lambda: ("ok", doctor.measure_collectives(), "")
    yield "nodes", partial(check_nodes, config)
    yield "clocks", doctor.clocks


def check_nodes(config: Config) -> tuple[str, str, str]:
    """Compare the ranks' flags and library versions."""
    from tools import doctor
    from trainer import ranks

    installed = doctor.installed(doctor.ROOT / "requirements.txt")
    versions = {name: version for name, (_, version) in installed.items()}
    ranks.compare({**versions, **settings.compared(config)})
    return "ok", f"all {settings.world_size()} ranks have the same flags and versions", ""


def hub_files(config: Config) -> dict[str, str]:
    """Return the repositories on the hub that the run reads, and a file of each."""
    files = {config.tokenizer_id: "tokenizer.json"}
    needs_model = not (config.from_scratch and config.model_id in presets.CONFIGS)
    if needs_model:
        files[config.model_id] = "config.json"
    return {name: file for name, file in files.items() if HUB_ID.fullmatch(name) and not Path(name).exists()}


def check_model(command: Command, findings: Findings) -> tuple[str, str, str]:
    """Compare the model's state with the devices' memory, from its configuration alone."""
    import torch

    from llama3 import assets
    from plan import planner
    from trainer import machine, parallel

    preferred = machine.preferred_precision(parallel.pick_device())
    command = settings.resolve_precision(command, preferred)
    config = command.config
    findings.model_config = assets.load_config(config.model_id, config.num_hidden_layers)
    ranks = settings.world_size()
    if ranks == 1:
        ranks = max(1, torch.cuda.device_count())
    run = plan.run_on_these_devices(command, ranks, {})
    findings.run = run
    best = plan.fitting(config, run)
    if best:
        size = planner.explain(run, best)[1]
    else:
        state = planner.state(run, ranks // (config.dp_replicate or 1)) / planner.GIB
        size = f"its state takes {state:.2f} of {run.device.memory_gib:.1f} GiB"
    parameters = f"{config.model_id}: {planner.trained(run):,} parameters train"
    return "ok", f"{parameters}; ranks: {ranks}; {size}", ""


def host_memory(config: Config, run) -> tuple[int, str, str]:
    """Return the bytes that the run takes of a host's memory, what takes them, and the fix.

    On a CPU that is its state; on CUDA a copy of the checkpoint, if saves are in the background.
    """
    from plan import planner

    if run.on_cpu:
        size = int(planner.state(run, run.ranks) * run.node_ranks)
        return size, "weights, gradients and AdamW take", "stop other programs, or train a smaller model"
    nodes = math.ceil(run.ranks / run.node_ranks)
    size = 0 if config.async_save == "off" else 12 * planner.trained(run) // nodes
    return size, "a save in the background takes", "--async_save=off"


def checkpoints(config: Config, run) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and how many of them there will be."""
    from dataset import preparation
    from plan import planner
    from trainer.saver import KEPT_TRANSIENT

    size = 12 * planner.trained(run)  # weights and two moments in fp32
    prepared = preparation.read(config.dataset_path)
    samples = prepared["samples"]["train"] if prepared else None
    every = config.save_every_n_train_steps
    if every is not None:
        steps = config.max_train_steps or DEFAULTS["max_train_steps"]
        if samples is not None:
            steps = settings.last_step(config, samples, run.global_batch_size)
        saves = max(1, math.ceil(steps / every))
    else:  # the epochs' ends save, and the newest of them stay
        saves = KEPT_TRANSIENT + 1
        if samples is not None:
            steps = settings.last_step(config, samples, run.global_batch_size)
            saves = min(saves, math.ceil(steps * run.global_batch_size / samples))
    keep = config.keep_last_n_checkpoints
    if keep is None:
        return size, saves
    # Beside those that are kept, there are the best one and the one that is being written.
    return size, min(saves, keep + 2)


def check_data(command: Command, findings: Findings) -> tuple[str, str, str]:
    """Compare the prepared data with their checksums and with the flags."""
    from dataset import batches, check
    from llama3 import assets, export

    config = command.config
    _, samples = checks.check_data(command, findings.model_config, {})
    if settings.world_size() > 1:  # then that read this rank's share of the files
        check.verify(config.dataset_path)
    tokenizer = assets.load_tokenizer(config.tokenizer_id)
    generation = export.generation_config(findings.model_config, tokenizer)
    findings.end_ids = set(generation.eos_token_id or ())
    findings.rows = batches.open_split(
        config.dataset_path,
        "train",
        config.max_seq_len,
        findings.model_config.vocab_size,
        max_samples=CHECKED_SAMPLES,
    )
    findings.collate = batches.Collator(config.max_seq_len, 1)
    findings.sample_text = tokenizer.decode(findings.rows[0]["input_ids"][:32])
    detail = f"{config.dataset_path}: {samples:,} samples of {config.max_seq_len} tokens"
    return "ok", f"{detail}, all files as prepared", ""
