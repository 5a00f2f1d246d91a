"""A source -> tokenized shards on disk, by several processes; a shard is written once and kept.

The source is read into blocks of documents, so that a shard holds as much text as another.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, Sequence, Value
from datasets.utils import tqdm

from llama3.encode import Encoded
from llama3.sources import Document, read_files, read_rows

BLOCK_BYTES = 1 << 20  # of text tokenized at once
MAX_SHARDS = 1024  # a kill costs each process the shard that it is writing, so shards are small
BLOCK = Features({name: Sequence(Value("string")) for name in Document._fields})
TOKENIZED = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "loss_mask": Sequence(Value("uint8")),
        "key": Value("int64"),  # hash of the ids and the seed, which decides the split
        "problem": Value("string"),  # of a document that cannot be used and has no ids
    }
)


class ProcessKilled(ValueError):
    """A tokenizing process was killed; what is done is kept."""


def file_blocks(paths: list[Path], text_column: str | None, folder: Path):
    """(blocks, function that reads a block) of files; the blocks are written below `folder`, once."""
    options = dict(paths=tuple(map(str, paths)), text_column=text_column, block_bytes=BLOCK_BYTES)
    blocks = generated(_blocks, folder, 1, BLOCK, **options)
    return blocks, lambda block: map(Document, *(block[name] for name in Document._fields))


def hub_blocks(rows: Dataset, name: str, text_column: str | None, join_tokens: int):
    """(blocks, function that reads a block) of a hub data set; a block is a range of rows."""
    size = max(BLOCK_BYTES, 16 * join_tokens)  # rows are joined inside a block: it holds several documents
    step = 1 + size * len(rows) // max(size, rows.data.nbytes)
    begins = list(range(0, max(1, len(rows) - step + 1), step))  # the last block takes the rest
    blocks = Dataset.from_dict({"begin": begins, "end": [*begins[1:], len(rows)]})
    tables = rows.with_format("arrow")

    def read(block: dict) -> Iterator[Document]:
        return read_rows(tables[block["begin"] : block["end"]], name, block["begin"] + 1, text_column)

    return blocks, read


def generated(generator, folder: Path, batch: int, features: Features | None = None, **options) -> Dataset:
    """Dataset.from_generator that writes `batch` rows at a time and raises the original error."""
    try:
        return Dataset.from_generator(
            generator, features, cache_dir=str(folder), gen_kwargs=options, writer_batch_size=batch
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _blocks(paths: tuple[str, ...], text_column: str | None, block_bytes: int) -> Iterator[dict]:
    block, size = [], 0
    for document in read_files(paths, text_column):
        block.append(document)
        size += len(document.text or document.messages or "") + len(document.where)
        if size >= block_bytes:
            yield _columns(block)
            block, size = [], 0
    yield _columns(block)


def _columns(block: list[Document]) -> dict:
    return {name: [getattr(document, name) for document in block] for name in Document._fields}


def tokenize(blocks: Dataset, encode: Callable[[dict], Encoded], seed: int, paths: list[Path], num_proc: int):
    """Write the shards that are missing, each a share of the blocks, in `num_proc` processes.

    Raises ProcessKilled, and what `encode` raises.
    """
    write = functools.partial(_write_shard, blocks, encode, seed, paths)
    todo = [index for index, path in enumerate(paths) if not path.exists()]
    if len(paths) == 1:  # little text: starting processes would take longer
        for index in todo:
            write(index)
        return
    fork = multiprocessing.get_context("fork")  # a worker inherits the tokenizer, which is slow to pickle
    with ProcessPoolExecutor(num_proc, fork, _begin_worker, (write,)) as pool:
        running = [pool.submit(_work, index) for index in todo]
        done = len(paths) - len(todo)
        bar = tqdm(as_completed(running), "tokenizing", len(paths), initial=done, unit="shard")
        try:
            for future in bar:
                future.result()
        except BrokenProcessPool as error:
            raise ProcessKilled(
                "a tokenizing process was killed, most likely for want of memory; "
                "start again: what is done is kept"
            ) from error
        except BaseException:
            for worker in multiprocessing.active_children():  # otherwise the pool waits for all shards
                worker.kill()
            raise


def _begin_worker(write: Callable[[int], None]) -> None:
    global _write
    _write = write
    # The pool ends its workers by SIGTERM. With the parent's handler a worker could survive it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    datasets.disable_progress_bars()
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when its parent has ended; otherwise it would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(index: int) -> None:
    _write(index)


def _write_shard(blocks: Dataset, encode, seed: int, paths: list[Path], index: int) -> None:
    """Write a shard to a temporary file, which `map` renames when it is whole."""
    blocks = blocks.shard(len(paths), index, contiguous=True)
    blocks.map(
        lambda batch: _table(encode({name: values[0] for name, values in batch.items()}), seed),
        batched=True,
        batch_size=1,
        remove_columns=blocks.column_names,
        features=TOKENIZED,
        cache_file_name=str(paths[index]),
        new_fingerprint=f"shard-{index}",  # otherwise `map` hashes the tokenizer, which takes seconds
        desc="tokenizing",
    )


def _table(encoded: Encoded, seed: int) -> pa.Table:
    """A row for each document, then one for each problem."""
    ends = np.cumsum([0, *encoded.lengths, *(0 for _ in encoded.problems)], dtype=np.int32)
    raw, bounds = memoryview(encoded.ids), ends.tolist()
    texts = (raw[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False))
    columns = {
        "input_ids": pa.ListArray.from_arrays(ends, encoded.ids),
        "loss_mask": pa.ListArray.from_arrays(ends, encoded.mask),
        "key": [xxhash.xxh64_intdigest(text, seed % 2**64) >> 1 for text in texts],
        "problem": [None] * len(encoded.lengths) + encoded.problems,
    }
    return pa.table(columns, TOKENIZED.arrow_schema)
