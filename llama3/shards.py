"""Tokenizes documents in shards, with several processes; a shard is written once and kept."""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from datasets.utils import tqdm

from llama3.assets import naming
from llama3.encode import Encoder
from llama3.sources import Document

BLOCK_BYTES = 1 << 20  # of text that is tokenized at once
MAX_SHARDS = 1024  # a kill loses one shard per process
BLOCK = pa.schema({name: pa.string() for name in Document._fields})
# A row is a document, with values for each token, or the problem of one. The key decides the split.
FLAGS = pa.list_(pa.bool_())
LISTS = {"input_ids": pa.list_(pa.int32()), "loss_mask": FLAGS, "document_starts": FLAGS}
SHARD = pa.schema({**LISTS, "key": pa.int64(), "problem": pa.string()})


class Unfinished(ValueError):
    """A preparation that stopped and can be continued; the message says how."""


def tokenize(documents: Iterator[Document], encoder: Encoder, seed: int, folder: Path, num_proc: int | None):
    """Writes the shards that are missing, and returns the paths of all in order. Raises ValueError."""
    blocks = write(folder / "blocks.arrow", BLOCK, _blocks(documents))
    count = min(MAX_SHARDS, len(blocks))
    paths = [folder / f"shard-{number:04}.arrow" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    work = (os.getpid(), blocks, encoder, seed, paths)
    fork = multiprocessing.get_context("fork")  # workers inherit the tokenizer, which is slow to pickle
    num_proc = min(num_proc or len(os.sched_getaffinity(0)), count)
    pool = ProcessPoolExecutor(num_proc, fork, _begin_worker, work)
    try:
        running = [pool.submit(_write_shard, number) for number in missing]
        done = count - len(missing)
        for future in tqdm(as_completed(running), "tokenizing", count, initial=done, unit=" shards"):
            future.result()
    except BrokenProcessPool as error:
        why = "a tokenizing process was killed, most likely for want of memory"
        raise Unfinished(f"{why}: start again, what is done is kept") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return paths


def write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """Writes a file unless it is there, and returns its batches; the file has its name once it is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        with naming(path), open(partial, "wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    return read(path)


def read(*paths: Path) -> list[pa.RecordBatch]:
    return [batch for path in paths for batch in pa.ipc.open_stream(pa.memory_map(str(path)))]


def _blocks(documents: Iterator[Document]) -> Iterator[pa.RecordBatch]:
    full, block, size = [], [], 0  # the last full block takes what fills no other: rows may be joined in it
    for document in tqdm(documents, "reading", unit=" documents"):
        block.append(document._asdict())
        size += len(document.text or document.messages or "") + len(document.where)
        if size >= BLOCK_BYTES:
            if full:
                yield pa.RecordBatch.from_pylist(full, BLOCK)
            full, block, size = block, [], 0
    yield pa.RecordBatch.from_pylist(full + block, BLOCK)


def _begin_worker(parent: int, *work) -> None:
    global _work
    _work = work
    gc.freeze()  # what the parent made is not the worker's to destroy
    # The pool stops its workers with SIGTERM, which the parent's handler would survive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process


def _write_shard(number: int) -> None:
    blocks, encoder, seed, paths = _work
    first, end = (len(blocks) * n // len(paths) for n in (number, number + 1))
    write(paths[number], SHARD, (_tokenized(block, encoder, seed) for block in blocks[first:end]))


def _tokenized(block: pa.RecordBatch, encoder: Encoder, seed: int) -> pa.RecordBatch:
    """A row for each document, then one for each problem."""
    ids, mask, lengths, problems = encoder.encode(Document(**row) for row in block.to_pylist())
    ends = np.cumsum([0, *lengths, *(0 for _ in problems)], dtype=np.int32)
    starts = np.isin(np.arange(len(ids)), ends)
    keys = [xxhash.xxh64_intdigest(ids[begin:end], seed % 2**64) >> 1 for begin, end in pairwise(ends)]
    columns = [pa.ListArray.from_arrays(ends, values) for values in (ids, mask, starts)]
    columns += [pa.array(keys, pa.int64()), pa.array([None] * len(lengths) + problems, pa.string())]
    return pa.record_batch(columns, schema=SHARD)
