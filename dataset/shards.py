"""Tokenizes documents in shards, with several processes; a shard is written once and kept."""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from datasets.utils import tqdm

from dataset.encode import Encoder
from dataset.sources import Document
from errors import UserError, naming

SHARD_BYTES = 2 << 20  # of text, which is tokenized at once; a kill loses one shard per process
# A row is a document, with values for each token, or the problem of one. The key decides the split.
FLAGS = pa.list_(pa.bool_())
LISTS = {"input_ids": pa.list_(pa.int32()), "loss_mask": FLAGS, "document_starts": FLAGS}
SHARD = pa.schema({**LISTS, "key": pa.int64(), "problem": pa.string()})


class Unfinished(UserError):
    """A preparation that stopped and can be continued."""


def tokenize(documents: Iterator[Document], encoder: Encoder, seed: int, folder: Path, num_proc: int):
    """Writes the shards that are missing, and returns the paths of all in order. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")  # workers inherit the tokenizer, which is slow to pickle
    pool = ProcessPoolExecutor(num_proc, fork, _begin_worker, (os.getpid(), encoder, seed))
    paths, running, most = [], [], 2 * num_proc
    try:
        for part in _cut(tqdm(documents, "tokenizing", unit=" documents")):
            paths.append(folder / f"shard-{len(paths):06}.arrow")
            if not paths[-1].exists():
                running.append(pool.submit(_write_shard, part, paths[-1]))
            if len(running) > most:  # what waits takes memory
                running[-most].result()
        for future in running:
            future.result()
    except BrokenProcessPool as error:
        raise Unfinished(
            "a tokenizing process was killed, most likely for want of memory",
            "Start again: what is done is kept",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return paths


def write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes a file, which has its name once it is whole."""
    partial = path.with_suffix(".part")
    with naming(path), open(partial, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read(*paths: Path) -> list[pa.RecordBatch]:
    return [batch for path in paths for batch in pa.ipc.open_stream(pa.memory_map(str(path)))]


def _cut(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents of each shard; the last one takes what fills no other, as rows may be joined in it."""
    full, part, size, count = [], [], 0, 0
    for document in documents:
        part.append(document)
        size += len(document.text or str(document.messages)) + len(document.where)
        # They grow with their number: each takes a map of the process, of which there are 65,530.
        if size >= SHARD_BYTES * (1 + count // 1000):
            count += 1
            if full:
                yield full
            full, part, size = part, [], 0
    yield full + part


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


def _write_shard(documents: list[Document], path: Path) -> None:
    """Writes a row for each document, then one for each problem."""
    encoder, seed = _work
    ids, mask, lengths, problems = encoder.encode(documents)
    ends = np.cumsum([0, *lengths, *(0 for _ in problems)], dtype=np.int32)
    starts = np.isin(np.arange(len(ids)), ends)
    keys = [xxhash.xxh64_intdigest(ids[begin:end], seed % 2**64) >> 1 for begin, end in pairwise(ends)]
    columns = [pa.ListArray.from_arrays(ends, values) for values in (ids, mask, starts)]
    columns += [pa.array(keys, pa.int64()), pa.array([None] * len(lengths) + problems, pa.string())]
    write(path, SHARD, [pa.record_batch(columns, schema=SHARD)])
