"""What attention inside documents costs on a CPU: python benchmarks/attention.py

Forward and backward, medians of interleaved repeats. Three ways: piece by piece (ours), one mask over the
row, and without boundaries; 9 heads of 64, three documents a row.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama3.model import packed_attention  # noqa: E402


def main(repeats: int = 15) -> None:
    print(f"{'rows x tokens':16}{'pieces':>12}{'mask':>12}{'no bounds':>12}   ms (of the pieces' time)")
    for B, T in ((2, 512), (2, 2048)):
        tensors = [torch.randn(B, 9, T, 64, requires_grad=True) for _ in range(3)]
        cuts = [0, T // 4, T // 2]
        bounds = torch.tensor(
            [row * T + cut for row in range(B) for cut in cuts] + [B * T], dtype=torch.int32
        )
        document = torch.bucketize(torch.arange(T), torch.tensor(cuts), right=True)
        mask = (document[:, None] == document) & torch.ones(T, T, dtype=torch.bool).tril()
        ways = {
            "pieces": lambda tensors=tensors, bounds=bounds: packed_attention(
                None, *tensors, cu_seqlens=bounds
            )[0],
            "mask": lambda tensors=tensors, mask=mask: F.scaled_dot_product_attention(
                *tensors, attn_mask=mask
            ),
            "no bounds": lambda tensors=tensors: F.scaled_dot_product_attention(*tensors, is_causal=True),
        }
        took = {name: [] for name in ways}
        for _ in range(repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way().sum().backward()
                took[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values[1:]) * 1000 for name, values in took.items()}
        row = "".join(f"{value:7.1f} ({value / medians['pieces']:.1f})" for value in medians.values())
        print(f"{f'{B} x {T}':16}{row}")


if __name__ == "__main__":
    main()
