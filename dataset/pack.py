"""Packs documents into samples of equal length, and holds some documents out for validation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataset import shards

INDICES = pa.list_(pa.int32())
SAMPLE = pa.schema({"input_ids": INDICES, "document_starts": INDICES, "loss_mask": pa.list_(pa.uint8())})


def held_out_below(keys: np.ndarray, lengths: np.ndarray, T: int, fraction: float) -> int:
    """The bound of the held-out documents' keys: the wanted fraction, or as many more as fill one sample."""
    if fraction == 0:
        return 0
    order = np.argsort(keys)
    wanted = max(1, round(fraction * len(order)), 1 + np.searchsorted(np.cumsum(lengths[order]), T))
    bound = 1 + int(keys[order][:wanted][-1])
    if lengths[keys >= bound].sum() < T:
        print("warning: too little text to hold documents out for validation, all of it is for training")
        return 0
    return bound


def pack(paths: list[Path], T: int, bound: int, split: str) -> Iterator[pa.RecordBatch]:
    """A split's documents end to end, cut every T tokens.

    Drops what does not fill a sample, and samples with nothing to learn, such as parts of long questions.
    """
    left = {name: np.empty(0, kind.value_type.to_pandas_dtype()) for name, kind in shards.LISTS.items()}
    for batch in (batch for path in paths for batch in shards.read(path)):
        chosen = (batch["key"].to_numpy() < bound) == (split == "validation")
        tokens = np.repeat(chosen, pc.list_value_length(batch["input_ids"]).to_numpy())
        for name, values in left.items():
            new = batch[name].flatten().to_numpy(zero_copy_only=False)[tokens]
            left[name] = np.concatenate([values, new])
        whole = len(left["input_ids"]) // T * T
        rows = {name: values[:whole].reshape(-1, T) for name, values in left.items()}
        rows["document_starts"][:, :1] = True  # even where the sample continues a document
        learns = (rows["loss_mask"] & ~rows["document_starts"]).any(1)
        rows = {name: values[learns] for name, values in rows.items()}
        counts, (_, starts) = rows["document_starts"].sum(1), np.nonzero(rows["document_starts"])
        cuts = pa.array(np.arange(0, rows["input_ids"].size + 1, T), pa.int32())
        start_cuts = pa.array(np.cumsum([0, *counts]), pa.int32())
        ids, mask = rows["input_ids"].ravel(), rows["loss_mask"].ravel().astype(np.uint8)
        lists = [(cuts, ids), (start_cuts, starts.astype(np.int32)), (cuts, mask)]
        yield pa.record_batch([pa.ListArray.from_arrays(*pair) for pair in lists], schema=SAMPLE)
        left = {name: values[whole:] for name, values in left.items()}
