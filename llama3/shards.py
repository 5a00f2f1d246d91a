"""Tokenizes a source in shards, with several processes; a shard is written once and kept."""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, Sequence, Value
from datasets.utils import tqdm

from llama3.encode import Encoder
from llama3.sources import Document, read_source

BLOCK_BYTES = 1 << 20  # of text that is tokenized at once
MAX_SHARDS = 1024  # a kill loses one shard per process
BLOCK = Features({name: Sequence(Value("string")) for name in Document._fields})
# A row is a document, or the problem of one that cannot be used. The key decides the split.
DOCUMENT = {"input_ids": Sequence(Value("int32")), "loss_mask": Sequence(Value("uint8"))}
DOCUMENT = Features({**DOCUMENT, "key": Value("int64"), "problem": Value("string")})


def tokenize(source: dict, encoder: Encoder, seed: int, folder: Path, num_proc: int) -> list[Path]:
    """Returns the files of the source's documents in order, and writes those that are missing.

    source: the arguments of read_source. Raises ValueError if a process is killed.
    """
    options = dict(block_bytes=max(BLOCK_BYTES, 16 * encoder.join_tokens), **source)
    blocks = generate(_read_blocks, folder / "blocks", 1, BLOCK, **options)
    count = min(MAX_SHARDS, len(blocks))
    paths = [folder / "shards" / f"{number:04}.arrow" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if count == 1:  # little text: starting processes would take longer
        for number in missing:
            _write_shard(blocks, encoder, seed, paths, number)
        return paths
    fork = multiprocessing.get_context("fork")  # workers inherit the tokenizer, which is slow to pickle
    with ProcessPoolExecutor(num_proc, fork, _begin_worker, (blocks, encoder, seed, paths)) as pool:
        running = [pool.submit(_work, number) for number in missing]
        bar = tqdm(as_completed(running), "tokenizing", count, initial=count - len(missing), unit="shard")
        try:
            for future in bar:
                future.result()
        except BrokenProcessPool as error:
            why = "a tokenizing process was killed, most likely for want of memory"
            raise ValueError(f"{why}: start again, what is done is kept") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return paths


def generate(generator, folder: Path, rows_at_once: int, features: Features | None, **options) -> Dataset:
    """Dataset.from_generator with a bounded memory, which raises the generator's own error."""
    folder, options = str(folder), dict(gen_kwargs=options, writer_batch_size=rows_at_once)
    try:
        return Dataset.from_generator(generator, features, cache_dir=folder, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _read_blocks(block_bytes: int, **source) -> Iterator[dict]:
    """Blocks of documents; the last one takes what does not fill a block."""
    full, block, size = [], [], 0
    for document in read_source(**source):
        block.append(document)
        size += len(document.text or document.messages or "") + len(document.where)
        if size >= block_bytes:
            if full:
                yield _columns(full)
            full, block, size = block, [], 0
    yield _columns(full + block)


def _columns(block: list[Document]) -> dict:
    return {name: [getattr(document, name) for document in block] for name in Document._fields}


def _begin_worker(*work) -> None:
    global _worker
    _worker = work
    # The pool stops its workers with SIGTERM, which the parent's handler would survive.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    tqdm.set_lock(threading.RLock())  # otherwise a worker that is killed may hold the parent's
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    datasets.disable_progress_bars()


def _work(number: int) -> None:
    _write_shard(*_worker, number)


def _write_shard(blocks: Dataset, encoder: Encoder, seed: int, paths: list[Path], number: int) -> None:
    """Writes a shard to a temporary file, which `map` renames when it is whole."""
    blocks.shard(len(paths), number, contiguous=True).map(
        lambda batch: _tokenized({name: values[0] for name, values in batch.items()}, encoder, seed),
        batched=True,
        batch_size=1,
        remove_columns=blocks.column_names,
        features=DOCUMENT,
        cache_file_name=str(paths[number]),
        new_fingerprint=f"shard-{number}",  # otherwise `map` hashes the tokenizer, which takes seconds
        desc="tokenizing",
    )


def _tokenized(block: dict, encoder: Encoder, seed: int) -> pa.Table:
    """A row for each document, then one for each problem."""
    ids, mask, lengths, problems = encoder.encode(map(Document, *(block[name] for name in Document._fields)))
    ends = np.cumsum([0, *lengths, *(0 for _ in problems)], dtype=np.int32)
    raw, bounds = memoryview(ids), ends.tolist()
    texts = (raw[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False))
    columns = {
        "input_ids": pa.ListArray.from_arrays(ends, ids),
        "loss_mask": pa.ListArray.from_arrays(ends, mask),
        "key": [xxhash.xxh64_intdigest(text, seed % 2**64) >> 1 for text in texts],
        "problem": [None] * len(lengths) + problems,
    }
    return pa.table(columns, DOCUMENT.arrow_schema)
