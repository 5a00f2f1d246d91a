"""LoRA's speed and memory beside transformers' Trainer with peft, and beside training the whole model.

python benchmarks/lora.py [--layers 8] [--steps 6] [--repeats 3] [--precision fp32]

SmolLM2-135M's widths and vocabulary, a fresh base, samples of one document each, one process. The ways take
turns. The losses of both LoRA ways must agree step by step. The first step of a run does not count.
"""

import argparse
import tempfile
from pathlib import Path

from common import interleave, make_model, make_rows, medians, run_ours, run_transformers

SIZES = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_attention_heads=9)
SIZES |= dict(num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True)
LORA = dict(lora_rank=16, lora_alpha=32, lora_targets="all-linear")


def main(layers: int, steps: int, repeats: int, precision: str, seq_len: int, batch: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model"), num_hidden_layers=layers, **SIZES)
        rows = make_rows(Path(folder, "data"), SIZES["vocab_size"], seq_len, rows=steps * batch)
        flags = [f"--model_id={model}", f"--dataset_path={rows}", f"--max_seq_len={seq_len}"]
        flags += [f"--precision={precision}", f"--micro_batch_size={batch}", f"--global_batch_size={batch}"]
        lora = [f"--{name}={value}" for name, value in LORA.items()]
        theirs = dict(per_device_train_batch_size=batch)
        if precision == "bf16":  # peft keeps adapters in fp32 beside a base in bf16
            theirs |= dict(bf16=True, dtype="bfloat16")
        ways = {
            "LoRA, train.py": lambda: run_ours([*flags, *lora], steps=steps),
            "LoRA, transformers + peft": lambda: run_transformers(
                model, rows, settings={**theirs, "lora": LORA}, steps=steps
            ),
            "whole model, train.py": lambda: run_ours(flags, steps=steps),
        }
        found = interleave(ways, repeats)
    shown = {name: medians([row for run in runs for row in run[1:]]) for name, runs in found.items()}
    losses = [[row["train_loss"] for row in runs[0]] for runs in found.values()][:2]
    apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
    print(f"{layers} layers, {batch} x {seq_len} tokens a step, {precision}, {repeats} x {steps} steps")
    print(f"{'':27}{'tokens/s':>10}{'ratio':>8}{'peak GiB':>10}")
    for name, row in shown.items():
        ratio = shown["LoRA, train.py"]["tokens_per_second"] / row["tokens_per_second"]
        print(f"{name:27}{row['tokens_per_second']:10.1f}{ratio:8.2f}{row['peak_memory_gib']:10.2f}")
    print(f"largest difference of the losses of both LoRA ways: {apart:.1e}")
    assert apart < (1e-4 if precision == "fp32" else 5e-2), "the two ways do not do the same work"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    main(**vars(parser.parse_args()))
