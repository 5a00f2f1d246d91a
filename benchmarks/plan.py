"""What the plan predicts, beside what torch's tracker, published runs and real CPU ranks take.

python benchmarks/plan.py [hardware] [depth] [published] [ranks]

hardware: what fits where, for the README. depth: the predicted peak of 8B beside the tracker's at full depth,
on 8 and 64 ranks. published: the predicted speed beside figures that others measured. ranks: the speed of
runs on one and two CPU ranks; needs an idle machine. docs/plan.rst holds the tables.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from common import make_model, make_rows, run_ours

from cli import settings
from cli.config import parse
from cli.plan import planner_run
from plan import devices, measure, planner

SIZE_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
SIZE_70B |= dict(num_key_value_heads=8, vocab_size=128256, model_type="llama", max_position_embeddings=8192)
LORA = ["--lora_rank=16", "--max_seq_len=4096"]
# (what, flags, number of devices, device); "70B" in the flags becomes a folder with its configuration.
HARDWARE = [
    ("mini", ["--mini"], 2, "rtx4090"),
    ("8B, LoRA, 4,096", LORA, 1, "rtx4090"),
    ("8B, LoRA, 4,096", LORA, 1, "l40s"),
    ("8B, LoRA, 4,096", LORA, 1, "h100-80g"),
    ("8B", [], 1, "h100-80g"),
    ("8B", [], 2, "h100-80g"),
    ("8B", [], 8, "a100-40g"),
    ("8B", [], 8, "a100-80g"),
    ("8B", [], 8, "h100-80g"),
    ("8B", [], 64, "h100-80g"),
    ("70B", ["--model_id=70B"], 32, "h100-80g"),
    ("70B", ["--model_id=70B"], 64, "h100-80g"),
    ("70B", ["--model_id=70B"], 64, "h200"),
]
# Tokens/s a GPU that others measured of 8B at 8,192 on 8 GPUs. torchtitan takes micro-batches of 2, and
# recomputes every second product: as many operations as the recompute of half of the layers.
TITAN = ["--micro_batch_size=2", "--recompute=16"]
PUBLISHED = [
    ("torchtitan, compiled", "h100-80g", [*TITAN, "--compile=on"], 6667),
    ("torchtitan, eager", "h100-80g", [*TITAN, "--compile=off"], 5762),
    ("nnScaler's curve (names no GPU)", "h100-80g", [], 6030),
    ("nnScaler's curve (names no GPU)", "a100-80g", [], 6030),
]
RANKS, HOW = (1, 2), (["--micro_batch_size=2"], ["--micro_batch_size=8"], ["--recompute=full"])


def planned(kind: str, ranks: int, flags: list[str]) -> planner.Run:
    command = settings.resolve_precision(parse(flags), "bf16")
    return planner_run(command, devices.parse_device(kind, ranks), ranks, 8, kind == "cpu", {})


def hardware(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(SIZE_70B))
    print(f"{'model':17}{'devices':>16}{'plan':>24}{'GiB':>7}{'of':>7}{'tokens/s':>10}")
    for what, flags, ranks, kind in HARDWARE:
        run = planned(kind, ranks, [flag.replace("70B", str(folder)) for flag in flags])
        best = planner.search(run)[0]
        plan = f"recompute {best.recompute}, {best.micro_batch_size} x {best.grad_accumulation_steps}"
        row = (
            f"{what:17}{f'{ranks} x {kind}':>16}{plan:>24}{best.predicted_peak_gib:7.1f}{run.limit_gib:7.1f}"
        )
        said = f"{best.predicted_tokens_per_second:10,.0f}" if best.fits else "  does not fit: "
        print(row + said + ("" if best.fits else planner.what_would_fit(run)), flush=True)


def depth() -> None:
    print(f"{'ranks':>5}{'tokens':>8}{'recompute':>11}{'tracker GiB':>13}{'plan GiB':>10}{'error':>8}")
    for ranks, tokens, mode in itertools.product((8, 64), (1024, 8192, 32768), planner.MODES):
        run = planned("h100-80g", ranks, [f"--max_seq_len={tokens}", "--compile=off"])
        plan = planner.Plan(dp_shard=ranks, recompute=mode)
        told = sum(planner.memory(run, plan)) / planner.GIB
        found = measure.measure(run.model, mode, 1, dict(dp_shard=ranks), layers=32)["peak"] / planner.GIB
        row = f"{ranks:5}{tokens:8}{mode:>11}{found:13.2f}{told:10.2f}{told / found - 1:+8.1%}"
        print(row, flush=True)


def published() -> None:
    print(f"{'who':33}{'measured':>10}{'plan':>8}{'error':>8}   tokens/s a GPU")
    for who, kind, flags, measured in PUBLISHED:
        told = planner.search(planned(kind, 8, flags))[0].predicted_tokens_per_second / 8
        name = f"{who}: {kind}" if "curve" in who else who
        print(f"{name:45}{measured:10}{told:8.0f}{told / measured - 1:+8.0%}")


def ranks(folder: Path, steps: int = 6) -> None:
    """A model with 1.4 GiB of state, trained in each way on each number of ranks."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=8192)
    sizes |= dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256)
    model = make_model(folder / "model", **sizes)
    data = make_rows(folder / "data", 8192, 256, rows=16 * steps)
    common = [f"--model_id={model}", f"--dataset_path={data}", "--max_seq_len=256", "--global_batch_size=16"]
    found = []
    print(f"{'ranks':>5}  {'flags':24}{'tokens/s':>9}{'plan':>8}")
    for count, how in itertools.product(RANKS, HOW):
        told = planner.search(planned("cpu", count, [*common, *how]))[0].predicted_tokens_per_second
        rows = run_ours([*common, *how], ranks=count, steps=steps)
        measured = statistics.median(row["tokens_per_second"] for row in rows[1:])
        found.append((told, measured))
        print(f"{count:5}  {' '.join(how):24}{measured:9.0f}{told:8.0f}", flush=True)
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if not 0.9 < a[0] / b[0] < 1.1]
    right = sum((a[0] > b[0]) == (a[1] > b[1]) for a, b in pairs)
    print(f"{right} of {len(pairs)} pairs whose predictions differ by a tenth or more are in the right order")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ["hardware", "depth", "published", "ranks"]
    parser.add_argument("parts", nargs="*", default=parts, metavar="PART", help=f"default: all of {parts}")
    wanted = parser.parse_args().parts
    if unknown := set(wanted) - set(parts):
        parser.error(f"{unknown.pop()} is no part: give one of {', '.join(parts)}")
    with tempfile.TemporaryDirectory() as temporary:
        for part in wanted:
            globals()[part](Path(temporary)) if part in ("hardware", "ranks") else globals()[part]()
