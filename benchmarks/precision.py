"""Matrix products of a training step in fp32 and bf16, here and as on a CPU with AVX2 alone.

python benchmarks/precision.py [--seconds 2] [--repeats 3]

A process cannot change its instructions: each side is a process of its own, and the sides take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
SIDES = {"this CPU": {}, "AVX2 alone": AVX2}
# Name -> the sizes (n, k, m) of a product (n, k) @ (k, m): those of SmolLM2-135M. Few positions for the last
# two, as without AVX-512 a product of 1,024 takes minutes in bf16.
PRODUCTS = {
    "a layer's projection": (1024, 576, 1536),
    "logits from hidden states": (64, 576, 49152),
    "hidden states' gradient from logits'": (64, 49152, 576),
}


def rate(name: str, dtype_name: str, seconds: float) -> float:
    """Return the GFLOP/s of a product on one core."""
    import torch

    torch.set_num_threads(1)
    n, k, m = PRODUCTS[name]
    dtype = getattr(torch, dtype_name)
    left = torch.randn(n, k).to(dtype)
    right = torch.randn(k, m).to(dtype)
    torch.mm(left, right)
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(left, right)
        count += 1
    return count * 2 * n * k * m / (time.perf_counter() - began) / 1e9


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """Return the rates of all products by name and dtype."""
    dtypes = ("float32", "bfloat16")
    return {name: {dtype: rate(name, dtype, seconds) for dtype in dtypes} for name in PRODUCTS}


def main(seconds: float, repeats: int) -> None:
    rates = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, variables in SIDES.items():
            command = [sys.executable, __file__, "--measure", f"--seconds={seconds}"]
            env = {**os.environ, **variables}
            process = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            rates[side].append(json.loads(process.stdout))
    print(f"{'GFLOP/s of one core':40}{'side':>12}{'fp32':>8}{'bf16':>8}{'bf16 / fp32':>13}")
    for name in PRODUCTS:
        for side in SIDES:
            fp32 = statistics.median(result[name]["float32"] for result in rates[side])
            bf16 = statistics.median(result[name]["bfloat16"] for result in rates[side])
            print(f"{name:40}{side:>12}{fp32:8.1f}{bf16:8.1f}{bf16 / fp32:13.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="one side, as JSON: for the script itself")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.seconds)))
    else:
        main(options.seconds, options.repeats)
