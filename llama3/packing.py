"""Parts of tokenized documents -> a training and a validation split of samples of equal length."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from datasets.table import InMemoryTable

from llama3.tokenizing import Batch, list_array, read_parts

FILE_BYTES = 500 << 20  # of a saved split's files, about


class PackingError(ValueError):
    """Too little text."""


def pack(folder: Path, parts: list[dict], result: Path, settings: dict, key: str) -> dict:
    """Split the parts' documents and save them, packed, as a DatasetDict at `result`. Returns the facts of what was done."""
    T = settings["max_seq_len"]
    total_documents, total_tokens = (
        sum(part["documents"] for part in parts),
        sum(part["tokens"] for part in parts),
    )
    if total_tokens < T:
        raise PackingError(
            f"the source has {total_documents} documents with {total_tokens} tokens in all, "
            f"fewer than one sample of --max_seq_len={T}: give more text or a smaller --max_seq_len"
        )
    threshold, histogram = _split_threshold(folder, parts, settings, total_documents, total_tokens)
    masked = any(part["masked"] for part in parts)
    packers = {split: _Packer(result / split, T, masked) for split in ("train", "validation")}
    held_out = np.zeros(1, bool)  # is the document that goes on held out?
    for batch, keys in read_parts(folder / "parts", parts):
        held_out = np.append(held_out[-1:], _mixed(keys[batch.starts], settings["seed"]) <= threshold)
        piece_held_out = held_out[np.cumsum(batch.starts)]  # 0: of the document that goes on
        packers["train"].add(batch, ~piece_held_out)
        packers["validation"].add(batch, piece_held_out)
    empty = InMemoryTable(packers["train"].schema.empty_table())
    rows = {
        split: datasets.Dataset(empty, split=datasets.NamedSplit(split), fingerprint=_fingerprint(key, split))
        for split in packers
    }
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.DatasetDict(rows).save_to_disk(str(result), num_shards=dict.fromkeys(rows, 1))
    if not quiet:
        datasets.enable_progress_bars()
    for packer in packers.values():
        packer.close()
    return dict(
        documents={split: packer.documents for split, packer in packers.items()},
        samples={split: packer.samples for split, packer in packers.items()},
        tokens={split: packer.samples * T for split, packer in packers.items()},
        dropped_tokens={split: packer.length for split, packer in packers.items()},
        target_tokens={split: packer.targets for split, packer in packers.items()},
        documents_by_length=histogram,
    )


def _document_table(folder, parts):
    """(keys, lengths in tokens) of whole documents, in order; one that goes on over several batches counts once."""
    open_key, open_length = np.empty(0, np.uint64), np.zeros(0, np.int64)
    for batch, keys in read_parts(folder / "parts", parts):
        begins, lengths = np.flatnonzero(batch.starts), batch.lengths
        if len(open_length):
            open_length += lengths[: begins[0] if len(begins) else None].sum()
        if len(begins):
            keys = np.concatenate([open_key, keys[begins]])
            lengths = np.concatenate([open_length, np.add.reduceat(lengths, begins, dtype=np.int64)])
            yield keys[:-1], lengths[:-1]
            open_key, open_length = keys[-1:], lengths[-1:].copy()
    yield open_key, open_length


def _split_threshold(folder, parts, settings, total_documents, total_tokens):
    """(largest key of a document held out for validation, documents by length).

    A document's key is a hash of its tokens and the seed, so that equal documents fall into the same split. Held out are the
    documents of smallest key: the wanted fraction, and more where they would not fill one sample.
    """
    T, fraction = settings["max_seq_len"], settings["validation_fraction"]
    wanted = max(1, round(fraction * total_documents))
    keys, lengths = np.empty(0, np.uint64), np.empty(0, np.int64)
    bins = np.zeros(64, np.int64)
    for more_keys, more_lengths in _document_table(folder, parts):
        bins += np.bincount(np.frexp(more_lengths)[1], minlength=64)
        keys = np.concatenate([keys, _mixed(more_keys, settings["seed"])])
        lengths = np.concatenate([lengths, more_lengths])
        if (
            len(keys) > 2 * (wanted + T) + 100_000
        ):  # only the smallest matter: a document has a token at least
            order = np.argsort(keys)[: wanted + T]
            keys, lengths = keys[order], lengths[order]
    histogram = {f"{1 << max(0, i - 1)}-{(1 << i) - 1}": int(n) for i, n in enumerate(bins) if n}
    nothing = (np.int64(-1), histogram)  # below every key
    if fraction == 0:
        return nothing
    order = np.argsort(keys)
    keys, counted = keys[order], np.cumsum(lengths[order])
    enough = np.flatnonzero((np.arange(1, len(keys) + 1) >= wanted) & (counted >= T))
    threshold = keys[enough[0]] if len(enough) else keys[-1]
    if total_tokens - counted[np.flatnonzero(keys <= threshold)[-1]] < T:
        print("warning: too little text to hold documents out for validation, all of it is for training")
        return nothing
    return threshold, histogram


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Keys scattered anew for each seed (splitmix64's finisher)."""
    x = keys ^ np.uint64(xxhash.xxh64_intdigest(str(seed).encode()))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Packer:
    """Documents end to end, cut every T tokens, into the Arrow files of a saved Dataset; `length` is what does not fill a last row.

    The files are written once and directly: `save_to_disk` would copy them out of a mapping of the whole.
    """

    def __init__(self, folder: Path, T: int, masked: bool):
        self.folder, self.T, self.masked = folder, T, masked
        names = ["input_ids", "document_starts"] + ["loss_mask"] * masked
        types = [pa.list_(pa.int32()), pa.list_(pa.int32())] + [pa.list_(pa.uint8())] * masked
        self.schema = pa.schema(list(zip(names, types, strict=True)))
        self.files, self.writer, self.room = [], None, 0
        self.tokens, self.masks, self.starts = [], [], []  # not yet written
        self.length = self.documents = self.samples = self.targets = 0

    def add(self, batch: Batch, chosen: np.ndarray) -> None:
        """Take the chosen pieces of a batch."""
        if not chosen.any():
            return
        tokens = np.repeat(chosen, batch.lengths)
        lengths, starts = batch.lengths[chosen], batch.starts[chosen]
        begins = (np.cumsum(lengths) - lengths)[starts]
        self.tokens.append(batch.ids[tokens])  # a copy: the part will be unmapped
        if self.masked:
            self.masks.append(np.ones(tokens.sum(), np.uint8) if batch.mask is None else batch.mask[tokens])
        self.starts.append(begins + self.length)
        self.length += len(self.tokens[-1])
        self.documents += len(begins)
        if self.length >= max(self.T, 1 << 20):
            self._write()

    def _write(self) -> None:
        rows, T = self.length // self.T, self.T
        tokens = np.concatenate(self.tokens)
        starts = np.union1d(np.concatenate(self.starts), np.arange(rows) * T)  # a row begins a piece
        here = starts[starts < rows * T]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(here // T, minlength=rows))])
        row_bounds = np.arange(rows + 1) * T
        columns = [
            list_array(row_bounds, tokens[: rows * T]),
            list_array(bounds, (here % T).astype(np.int32)),
        ]
        if self.masked:
            mask = np.concatenate(self.masks)
            columns.append(list_array(row_bounds, mask[: rows * T]))
            self.masks = [mask[rows * T :]]
            self.targets += int(mask[: rows * T].sum())
        else:
            self.targets += rows * T
        batch = pa.record_batch(columns, schema=self.schema)
        if self.room <= 0:
            self._begin_file()
        self.writer.write_batch(batch)
        self.room -= batch.nbytes
        self.tokens, self.starts = [tokens[rows * T :]], [starts[starts >= rows * T] - rows * T]
        self.length -= rows * T
        self.samples += rows

    def _begin_file(self) -> None:
        if self.writer:
            self.writer.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files.append(self.folder / f"part{len(self.files)}")
        self.writer, self.room = pa.ipc.new_stream(str(self.files[-1]), self.schema), FILE_BYTES

    def close(self) -> None:
        """Write what fills a row and put the files in the place of those of the empty Dataset saved in the folder."""
        if self.length >= self.T:
            self._write()
        if not self.writer:
            return
        self.writer.close()
        state = json.loads((self.folder / "state.json").read_text())
        for old in state["_data_files"]:
            (self.folder / old["filename"]).unlink()
        names = [f"data-{index:05}-of-{len(self.files):05}.arrow" for index in range(len(self.files))]
        for file, name in zip(self.files, names, strict=True):
            file.rename(self.folder / name)
        (self.folder / "state.json").write_text(
            json.dumps(state | {"_data_files": [{"filename": name} for name in names]}, indent=2)
        )


def _fingerprint(key: str, split: str) -> str:
    return xxhash.xxh3_64_hexdigest(f"{key}-{split}".encode())
