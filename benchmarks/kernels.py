"""The loss alone and attention alone, forward and backward, beside torch's own: milliseconds and memory.

python benchmarks/kernels.py                  the sizes of Llama 3 8B on a GPU; --device=cpu: a tiny size
"""

import argparse
import statistics
import time

from common import interleave

# T tokens of hidden size D, vocabulary V; N query heads and K key-value heads of size H.
SIZES = {
    "cuda": dict(T=8192, D=4096, V=128256, N=32, K=8, H=128),
    "cpu": dict(T=256, D=64, V=1000, N=4, K=2, H=16),
}
TOLERANCE = 2e-2  # of bf16, relative to the largest value


def timed(device: str, actions: dict, inputs: list, repeats: int = 10) -> list[dict]:
    """Each action returns a tensor, whose backward counts too; the first one is the reference."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(action) -> tuple[float, float, list]:
        for tensor in inputs:
            tensor.grad = None
        wait()
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        out = action()
        out.backward(torch.ones_like(out))
        wait()
        took = 1000 * (time.perf_counter() - began)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if device == "cuda" else None
        return took, peak, [out.detach(), *(tensor.grad for tensor in inputs)]

    first, rows = {}, []
    for name, action in actions.items():  # also warms up, and compiles
        try:
            first[name] = run(action)
        except torch.OutOfMemoryError as error:
            rows.append(dict(name=name, out_of_memory=str(error).split(". ")[0]))
    fitting = {name: lambda action=actions[name]: run(action)[:2] for name in first}
    for name, runs in interleave(fitting, repeats).items():
        reference = next(iter(first.values()))[2]
        pairs = zip(first[name][2], reference, strict=True)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        took = statistics.median(milliseconds for milliseconds, _ in runs)
        rows.append(dict(name=name, milliseconds=took, peak_gib=runs[-1][1], largest_error=error))
    return rows


def loss_rows(device: str) -> list[dict]:
    """Ours, in chunks, against F.cross_entropy on the whole logits in fp32."""
    import torch
    import torch.nn.functional as F

    from llama3.loss import chunked_cross_entropy, loss_and_gradient

    T, D, V = (SIZES[device][name] for name in "TDV")
    torch.manual_seed(0)
    options = dict(device=device, dtype=torch.bfloat16)
    hidden, weight = torch.randn(T, D, **options), torch.randn(V, D, **options).mul_(0.02)
    labels, compiled = torch.randint(V, (T,), device=device), torch.compile(loss_and_gradient, dynamic=True)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]

    def whole():
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    ours = {"ours": None, "ours, compiled": compiled}
    actions = {
        name: lambda how=how: chunked_cross_entropy(hidden, weight, labels, how) for name, how in ours.items()
    }
    return timed(device, {"cross_entropy on whole logits": whole} | actions, inputs)


def attention_rows(device: str) -> list[dict]:
    """One document in the row, against torch's causal attention; then documents of a sixteenth of it."""
    import torch
    import torch.nn.functional as F

    from llama3.model import packed_attention

    T, N, K, H = (SIZES[device][name] for name in "TNKH")
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, T, H, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (N, K, K)
    ]

    def packed(length: int):
        bounds = torch.arange(0, T + 1, length, dtype=torch.int32, device=device)
        return packed_attention(None, *inputs, cu_seqlens=bounds, longest=torch.empty(length, 0))[0]

    def causal():
        out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    def causal_by_document():
        q, k, v = (x.view(x.shape[1], 16, T // 16, H).transpose(0, 1) for x in inputs)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (16, N, T / 16, H)
        return out.transpose(1, 2).reshape(1, T, N, H)

    rows = timed(device, {"causal (torch)": causal, "ours, one document": lambda: packed(T)}, inputs)
    by_document = {"batched (torch)": causal_by_document, "ours, 16 documents": lambda: packed(T // 16)}
    return rows + timed(device, by_document, inputs)


def measure(device: str) -> dict[str, list[dict]]:
    return {"loss": loss_rows(device), "attention": attention_rows(device)}


def show(found: dict[str, list[dict]]) -> None:
    for part, rows in found.items():
        print(f"\n{f'{part}, forward and backward':32}{'ms':>9}{'GiB':>8}  largest error")
        for row in rows:
            if "out_of_memory" in row:
                print(f"{row['name']:32}  {row['out_of_memory']}")
                continue
            peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
            print(f"{row['name']:32}{row['milliseconds']:9.2f}{peak:>8}  {row['largest_error']:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cuda")
    show(measure(parser.parse_args().device))
