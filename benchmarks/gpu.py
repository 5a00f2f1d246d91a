"""Proves and measures everything on the GPUs of this machine, in one command and without a network.

python benchmarks/gpu.py                  the tests marked gpu, then the table (also: make gpu)
python benchmarks/gpu.py --device=cpu     checks every part at a tiny size

Our numbers are what train.py writes to metrics.jsonl, as medians over the steps after the warm-up. MFU is the
share of the GPUs' dense bf16 rate by PaLM's convention: 6 operations per parameter of a matrix product and
token, and attention over the whole row; recompute does not count.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import kernels
from common import ROOT, RunFailed, interleave, make_model, make_rows, medians, run_ours, run_transformers

LAYERS_8B, LAYERS = 32, 4
WIDTHS_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32)
WIDTHS_8B |= dict(num_key_value_heads=8, rope_theta=500000.0, rms_norm_eps=1e-5)
TINY = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_attention_heads=4)
TINY |= dict(num_key_value_heads=2)
# Tokens of a sample, and of a rank's step; steps of a run, and the first ones that do not count.
SIZES = {
    "cuda": dict(widths=WIDTHS_8B, seq_lens=(8192, 4096), rank_tokens=32768, steps=8, warm_up=3),
    "cpu": dict(widths=TINY, seq_lens=(128, 64), rank_tokens=256, steps=4, warm_up=1),
}
LOSS_TOLERANCE = 1e-2  # nats, between runs of the same weights and tokens in bf16
RECOMPUTE = ("none", "selective", "full")
TESTS = ["tests/test_gpu.py", "tests/test_model.py", "tests/test_verify_resume.py"]
MEASURED = ("tokens_per_second", "mfu", "peak_memory_gib", "step_seconds")
# Columns of the table as text.
COLUMNS = dict(trainer="{}", seq_len="{:,}", layers="{}", recompute="{}", compile="{}", documents="{}")
COLUMNS |= dict(zip(MEASURED, ("{:,.0f}", "{:.1%}", "{:.2f}", "{:.3f}"), strict=True))


def alone(function, *args):
    """Calls the function in a process of its own, so that this one never holds memory of a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def machine(device: str) -> dict:
    import torch
    import transformers

    ranks = torch.cuda.device_count() if device == "cuda" else 1
    name = torch.cuda.get_device_name() if device == "cuda" and ranks else "CPU"
    return dict(device=name, ranks=ranks, torch=torch.__version__, transformers=transformers.__version__)


# ---------------------------------------------------------------- training


class Bench:
    """The runs of one machine: prepares each model and data set once, and stops starting runs in time."""

    def __init__(self, device: str, ranks: int, folder: Path, deadline: float):
        self.device, self.ranks, self.folder, self.deadline = device, ranks, folder, deadline
        self.size = SIZES[device]
        self.accumulation = {T: self.size["rank_tokens"] // T for T in self.size["seq_lens"]}
        tiny = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # tiny matrices need no threads
        self.env = tiny if device == "cpu" else {}

    def model(self, layers: int) -> Path:
        folder = self.folder / f"model-{layers}"
        most = dict(num_hidden_layers=layers, max_position_embeddings=max(self.size["seq_lens"]))
        if not folder.exists():
            alone(partial(make_model, folder, self.device, **self.size["widths"], **most))
        return folder

    def rows(self, seq_len: int, documents: bool) -> Path:
        folder = self.folder / f"rows-{seq_len}-{documents}"
        count, mean = 4 * self.ranks * self.accumulation[seq_len], seq_len // 16 if documents else None
        vocab = self.size["widths"]["vocab_size"]
        return folder / "rows" if folder.exists() else make_rows(folder, vocab, seq_len, count, mean)

    def measured(self, run, *args, **options) -> dict:
        """The medians of a run's steps; why there are none, if memory does not suffice or time is over."""
        if time.monotonic() > self.deadline:
            return {"left_out": "the time was over (--minutes)"}
        try:
            rows = run(*args, ranks=self.ranks, env=self.env, steps=self.size["steps"], **options)
        except RunFailed as failed:
            memory = "memory" in str(failed).lower()
            return {"out_of_memory" if memory else "error": str(failed)}
        losses = [row["train_loss"] for row in rows]
        middle = medians(rows[self.size["warm_up"] :])
        return {name: middle[name] for name in MEASURED if name in middle} | {"losses": losses}

    def ours(self, seq_len: int, recompute: str, compiled: str, layers=LAYERS, documents=False) -> dict:
        flags = [f"--model_id={self.model(layers)}", f"--dataset_path={self.rows(seq_len, documents)}"]
        flags += [f"--max_seq_len={seq_len}", f"--grad_accumulation_steps={self.accumulation[seq_len]}"]
        flags += [f"--recompute={recompute}", f"--compile={compiled}"]
        way = dict(trainer="train.py", seq_len=seq_len, layers=layers, recompute=recompute)
        return say(way | dict(compile=compiled, documents=documents) | self.measured(run_ours, flags))

    def theirs(self, seq_len: int, recompute: str) -> dict:
        settings = dict(bf16=True, gradient_accumulation_steps=self.accumulation[seq_len])
        settings["gradient_checkpointing"] = recompute == "full"
        inputs = self.model(LAYERS), self.rows(seq_len, False)
        found = self.measured(run_transformers, *inputs, settings=settings)
        way = dict(trainer="transformers", seq_len=seq_len, layers=LAYERS, recompute=recompute)
        return say(way | dict(compile="off", documents=False) | found)


def extrapolated(rows: list[dict], config_folder: Path) -> list[dict]:
    """8B on as many GPUs, from what two more layers cost: time and memory are linear in the layers."""
    import torch

    from llama3.model import Llama

    def flops(layers: int, seq_len: int) -> float:
        batch = {"input_ids": torch.empty(1, seq_len)}
        return Llama(str(config_folder), from_scratch=True, num_hidden_layers=layers).flops_per_token(batch)

    found, ways = [], ("trainer", "seq_len", "recompute", "compile", "documents")
    deep = {tuple(row[name] for name in ways): row for row in rows if row["layers"] == LAYERS}
    for few in rows:
        many = deep.get(tuple(few[name] for name in ways), {})
        if few["layers"] == LAYERS or "losses" not in few or "losses" not in many:
            continue
        row, times = {name: many[name] for name in ways}, (LAYERS_8B - LAYERS) / (LAYERS - few["layers"])
        for name in ("step_seconds", "peak_memory_gib"):
            row[name] = many[name] + times * (many[name] - few[name])
        faster = many["step_seconds"] / row["step_seconds"]
        row |= dict(layers=LAYERS_8B, tokens_per_second=many["tokens_per_second"] * faster)
        if "mfu" in many:
            work = flops(LAYERS_8B, row["seq_len"]) / flops(LAYERS, row["seq_len"])
            row["mfu"] = many["mfu"] * work * faster
        found.append(row)
    return found


def against_transformers(bench: Bench, table: list[dict], repeats: int) -> dict:
    """Both in turn on the same weights and tokens, each with the least recompute that fits.

    On several GPUs, transformers' Trainer replicates the model, as torchrun starts it; its FSDP is left out.
    """
    rows = [row for row in table if "losses" in row]
    best = max(rows, key=lambda row: row["tokens_per_second"], default=None)
    if best is None:
        return {"left_out": "train.py has no row to compare"}
    seq_len, first = best["seq_len"], bench.theirs(best["seq_len"], "none")
    need = "full" if "out_of_memory" in first else "none"
    ours = partial(bench.ours, seq_len, best["recompute"], best["compile"])
    found = interleave(dict(ours=ours, transformers=partial(bench.theirs, seq_len, need)), repeats)
    kept = {name: [row for row in rows if "losses" in row] for name, rows in found.items()}
    if not all(kept.values()):
        return {"left_out": "a side has no numbers", "runs": found["ours"] + found["transformers"]}
    result = {name: medians(rows) for name, rows in kept.items()}
    result["runs"] = kept["ours"] + kept["transformers"]
    result["loss_difference"] = difference(kept["ours"][0], kept["transformers"][0])
    for name in ("tokens_per_second", "peak_memory_gib"):
        result[f"{name}_ratio"] = result["ours"][name] / result["transformers"][name]
    return result


def difference(row: dict, other: dict) -> float:
    """The largest of two runs' losses over their steps."""
    return max(abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True))


# ---------------------------------------------------------------- the report


def say(row: dict) -> dict:
    """Prints a row of the table; instead of numbers, why there are none."""
    shown = (form.format(row[name]) if name in row else "-" for name, form in COLUMNS.items())
    why = "".join(f"  {row[name]}" for name in ("out_of_memory", "error", "left_out") if name in row)
    print("".join(value.rjust(18) for value in shown) + why, flush=True)
    return row


def run_tests(device: str) -> str:
    """Runs the tests marked gpu, or the same bodies on the CPU; the files at once, as nothing is measured."""
    chosen, good = (["-m", "gpu"], [0]) if device == "cuda" else (["-m", "not slow", "-k", "cpu"], [0, 5])
    command = [sys.executable, "-m", "pytest", *chosen]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    running = [subprocess.Popen([*command, file], **options) for file in TESTS]
    for process in running:
        print(process.communicate()[0], flush=True)
    codes = [process.returncode for process in running]
    return "passed" if {*codes} <= {*good} else f"pytest ended with {codes}"


def measure(bench: Bench, repeats: int, report: dict) -> None:
    """Fills the report, the most telling rows first, as the last ones are left out when time is over."""
    long, short = bench.size["seq_lens"]
    print("".join(name.rjust(18) for name in COLUMNS))
    table = report["training"] = [bench.ours(long, recompute, "on") for recompute in RECOMPUTE]
    report["against_transformers"] = against_transformers(bench, table, repeats)
    report |= alone(kernels.measure, bench.device)
    table += [bench.ours(long, recompute, "on", layers=LAYERS // 2) for recompute in RECOMPUTE]
    table += [bench.ours(long, "none", "on", documents=True)]
    table += [bench.ours(short, recompute, "on") for recompute in RECOMPUTE]
    table += [bench.ours(T, recompute, "off") for T in (long, short) for recompute in RECOMPUTE]
    print("8B on as many devices, extrapolated:")
    report["extrapolated_8b"] = [say(row) for row in extrapolated(table, bench.model(LAYERS))]
    kernels.show({name: report[name] for name in ("loss", "attention")})


def problems(report: dict) -> Iterator[str]:
    """What is wrong: a failed test or run, or losses that differ where they must not."""
    if report["tests"] not in ("passed", "skipped"):
        yield f"tests: {report['tests']}"
    plain = {}  # the first row of each model and data
    for row in report["training"]:
        if "losses" in row:
            first = plain.setdefault((row["seq_len"], row["layers"], row["documents"]), row)
            if (found := difference(first, row)) > LOSS_TOLERANCE:
                yield f"losses differ by {found:.4f} between recompute or compile of {row['seq_len']} tokens"
    peer = report["against_transformers"]
    yield from (row["error"] for row in report["training"] + peer.get("runs", []) if "error" in row)
    if (found := peer.get("loss_difference", 0)) > LOSS_TOLERANCE:
        yield f"the losses differ from transformers' by {found:.4f}"
    for row in report["loss"] + report["attention"]:
        if row.get("largest_error", 0) > kernels.TOLERANCE:
            yield f"{row['name']}: an error of {row['largest_error']:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--output_path", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=7.5, help="no run starts later; the report says so")
    parser.add_argument("--repeats", type=int, default=2, help="of ours and transformers' Trainer in turn")
    parser.add_argument("--skip_tests", action="store_true")
    args, began = parser.parse_args(), time.monotonic()
    report = {"machine": alone(machine, args.device), "mfu": __doc__.split("MFU is ")[1].strip()}
    if not (ranks := report["machine"]["ranks"]):
        parser.error("no CUDA device is here; --device=cpu checks every part at a tiny size")
    report["tests"] = "skipped" if args.skip_tests else run_tests(args.device)
    try:
        with TemporaryDirectory() as folder:
            bench = Bench(args.device, ranks, Path(folder), began + 60 * args.minutes)
            measure(bench, args.repeats, report)
    finally:
        report["seconds"] = time.monotonic() - began
        args.output_path.write_text(json.dumps(report, indent=1) + "\n")
    peer, wrong = report["against_transformers"], list(problems(report))
    if "loss_difference" in peer:
        speed, memory = (peer[f"{name}_ratio"] for name in ("tokens_per_second", "peak_memory_gib"))
        print(f"\ntrain.py has {speed:.2f} times transformers' tokens/s with {memory:.2f} times its memory")
    print(f"{report['seconds']:.0f} s; {args.output_path}; " + ("\n".join(wrong) or "nothing is wrong"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
