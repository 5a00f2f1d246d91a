"""Saving, loading, merging and exporting beside `cp` of the same bytes: python benchmarks/checkpoint.py
[--gib 1.5]

One rank; a model of plain matrices with Adam's two moments. Times are medians of interleaved repeats. A ratio
is cp's time over ours: above 1, ours is faster. `cp` leaves its bytes in the page cache, ours are on the disk
when it
returns: compare with `cp, then sync`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.checkpoint import Checkpoint, CheckpointName  # noqa: E402
from trainer.saver import Saver  # noqa: E402
from trainer.tensorfile import TensorFileWriter  # noqa: E402


def seconds(action, *replaced: Path) -> float:
    """The time of the action alone, with what it would replace removed and earlier writes on the disk."""
    for path in replaced:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def copy(source: Path, target: Path, sync: bool) -> None:
    subprocess.run(["cp", "-rL", source, target], check=True)
    if sync:
        subprocess.run(["sync", "-f", target], check=True)


def export(source: Path, target: Path) -> None:
    opened = Checkpoint.open(source)
    opened.verify()
    specs = {name: (torch.bfloat16, shape) for name, shape in opened.shapes.items()}
    with TensorFileWriter(target, specs, {}) as writer:
        for name, tensor in opened.parameters():
            writer.add(name, tensor.to(torch.bfloat16))
        writer.finish()


def main(gib: float, repeats: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    matrices = range(max(1, round(gib * 2**30 / (3 * 4 * 2048 * 4096))))
    names = [name for n in matrices for name in (f"model.{n}", f"optimizer.{n}.m", f"optimizer.{n}.v")]
    tensors = {name: torch.randn(2048, 4096) for name in names}
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    group = dist.new_group(backend="gloo")
    saver, background = (Saver(folder / "ckpt", 1, background, group, None) for background in (False, True))
    last, merged = folder / "ckpt" / "last", folder / "merged.ckpt"
    exported, copied = folder / "exported", folder / "copied"

    def save(saver: Saver) -> None:
        saver.save(CheckpointName(0, 1), tensors, {"step": 1}, "", time.perf_counter())

    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        took = {"save": seconds(lambda: save(saver))}
        save(background)
        took["save in the background, blocked"] = background.blocked_seconds
        background.wait()
        took["save in the background, total"] = background.total_seconds
        took["load and verify"] = seconds(
            lambda: [Checkpoint.open(last).verify(), *map(Checkpoint.open(last).read, names)]
        )
        took["merge"] = seconds(lambda: Checkpoint.open(last).merge(merged), merged)
        took["export in bf16"] = seconds(lambda: export(last, exported), exported)
        took["cp"] = seconds(lambda: copy(last, copied, sync=False), copied)
        took["cp, then sync"] = seconds(lambda: copy(last, copied, sync=True), copied)
        for name, value in took.items():
            found.setdefault(name, []).append(value)
    dist.destroy_process_group()
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{size / 2**30:.2f} GiB in {len(tensors)} tensors, {repeats} repeats, in {folder}")
    print(f"{'':36}{'seconds':>9}{'GiB/s':>8}{'of cp':>8}{'of cp + sync':>14}")
    for name, value in medians.items():
        ratios = [medians[reference] / value for reference in ("cp", "cp, then sync")]
        print(f"{name:36}{value:9.3f}{size / 2**30 / value:8.2f}{ratios[0]:8.2f}{ratios[1]:14.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.5, help="bytes of weights and optimizer together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure; default: a temporary folder"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        main(options.gib, options.repeats, Path(scratch))
