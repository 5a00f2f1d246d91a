"""Texts, a small tokenizer and what a prepared folder holds, for the tests of the data."""

import contextlib
import functools
import json
import os
import random
import resource
import tempfile
from pathlib import Path

from filelock import FileLock
from helpers.runs import WORDS, small_tokenizer


@functools.cache
def real_tokenizer(name: str):
    from llama3.assets import load_tokenizer

    if name == "small":
        return small_tokenizer()
    # The first use of SmolLM2 converts its packaged weights: one of pytest-xdist's workers does it for all.
    with FileLock(Path(tempfile.gettempdir(), f"llama3-tests-{os.getuid()}.lock")):
        return load_tokenizer(name)


def make_texts(count: int, seed: int = 0, most: int = 120) -> list[str]:
    draw = random.Random(seed)
    lengths = (draw.randint(5, most) for _ in range(count))
    return [f"Number {n}. " + " ".join(draw.choices(WORDS, k=k)) for n, k in enumerate(lengths)]


def write_jsonl(path: Path, records: list) -> Path:
    records = [record if isinstance(record, dict) else {"text": record} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table_bytes(column, name: str = "text", **options) -> bytes:
    """A parquet file of one column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), sink, **options)
    return sink.getvalue().to_pybytes()


def prepare_records(folder: Path, tokenizer, records: list, name: str = "p", T: int = 64, **settings) -> Path:
    """Write the records as a .jsonl file and prepare it at `folder / name`."""
    from dataset.prepare import prepare

    return prepare(str(write_jsonl(folder / "a.jsonl", records)), tokenizer, folder / name, T, **settings)


def rows(folder: Path, split: str) -> list[dict]:
    """Rows of a prepared split as lists."""
    import datasets

    return list(datasets.load_from_disk(str(folder / split)))


def samples(folder: Path) -> list[list[dict]]:
    return [rows(folder, split) for split in ("train", "validation")]


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """The token ids of each document of a split, put together again from its rows."""
    found: list[list[int]] = []
    for row in rows(folder, split):
        for token, id_ in enumerate(row["input_ids"]):
            if token in row["document_starts"] and (token or not found or found[-1][-1] == 0):
                found.append([])
            found[-1].append(id_)
    return found


def facts(folder: Path) -> dict:
    return json.loads((folder / "preparation.json").read_text())


@contextlib.contextmanager
def file_size_limit(size: int):
    """Stands for a full disk: no file may grow beyond the size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
