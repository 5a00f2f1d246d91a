"""Prepared data: text or chat -> samples of equal length on disk (`prepare`), and from there to batches."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset, DatasetDict
from filelock import FileLock

from llama3 import shards, sources
from llama3.assets import document_separator
from llama3.encode import Encoder
from llama3.loss import IGNORED

FORMAT = 2  # of the prepared folder; raised whenever the same input would give other samples
FILE_BYTES = 500 << 20  # of a saved split's files, about
INDICES = pa.list_(pa.int32())
SAMPLE = pa.schema({"input_ids": INDICES, "document_starts": INDICES, "loss_mask": pa.list_(pa.uint8())})


class DataError(ValueError):
    """Data that is missing, unusable or prepared differently; the message says what to do."""


def prepare(
    dataset_id: str,
    tokenizer,
    dataset_path: str | Path,
    max_seq_len: int,
    validation_fraction: float = 0.01,
    seed: int = 0,
    text_column: str | None = None,
    skip_bad_samples: bool = False,
    num_proc: int | None = None,
) -> Path:
    """Tokenizes, packs and splits `dataset_id` into a DatasetDict at `dataset_path`, and prints a summary.

    With the settings of an earlier preparation it does nothing, with others it refuses. After a kill it
    continues. Raises DataError, EncodeError and AssetError.
    """
    target = Path(dataset_path).resolve()
    files = sources.find_files(dataset_id)
    source = sources.identity(files) if files else dataset_id
    settings = dict(format=FORMAT, source=source, tokenizer=_fingerprint(tokenizer), text_column=text_column)
    settings |= dict(max_seq_len=max_seq_len, validation_fraction=validation_fraction, seed=seed)
    work = target.with_name(target.name + ".preparing")
    if work.exists():
        print(f"continuing in {work}, after any other process that prepares there")
    elif _already_prepared(target, settings):
        return target
    with FileLock(f"{work}.lock"):
        if not _already_prepared(target, settings):  # another process may have done it meanwhile
            folder = work / _hash([settings, datasets.__version__])
            for stale in {*work.glob("*")} - {folder}:
                shutil.rmtree(stale)
            documents = sources.read_documents(dataset_id, files, text_column)
            joins = not files and dataset_id.partition(":")[0] in sources.BOOKCORPUS
            encoder = Encoder(tokenizer, max_seq_len if joins else 0)
            paths = shards.tokenize(
                documents, encoder, seed, folder, num_proc or len(os.sched_getaffinity(0))
            )
            _save(paths, folder, dataset_id, settings, skip_bad_samples)
            os.sync()  # so that the folder is whole even after a power cut
            (folder / "result").rename(target)
            print(summary(target, tokenizer))
        shutil.rmtree(work, ignore_errors=True)
        Path(f"{work}.lock").unlink(missing_ok=True)  # a process that still waits finds the data in place
    return target


def open_split(
    dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples: int | None = None
) -> Dataset:
    """Opens a split as rows in numpy, of more than `max_samples` always the same ones. Raises DataError."""
    path, command = Path(dataset_path), f"python train.py --prepare_data --max_seq_len={max_seq_len}"
    known = read_preparation(path)
    if known is None:
        fix = f"run `{command} --dataset_path={path}` with this run's other data flags"
        raise DataError(f"{path} is not prepared: {fix}")
    if (prepared := known["settings"]["max_seq_len"]) != max_seq_len:
        fix = f"use --max_seq_len={prepared}, or another --dataset_path, prepared by `{command}`"
        raise DataError(f"{path} holds samples of {prepared} tokens, --max_seq_len is {max_seq_len}: {fix}")
    if (largest := known["max_token_id"]) >= vocab_size:
        fix = "prepare the data with the model's own tokenizer (--tokenizer_id, another --dataset_path)"
        raise DataError(f"{path} has token id {largest}, the model's vocabulary has {vocab_size}: {fix}")
    try:
        dataset = datasets.load_from_disk(str(path / split))
    except Exception as error:  # datasets raises many kinds for a damaged or newer folder
        what = f"{path}/{split}, saved by datasets {known['datasets']}, cannot be read"
        raise DataError(f"{what}: {error}. Prepare it again.") from error
    if max_samples is not None and len(dataset) > max_samples:
        dataset = dataset.select(np.linspace(0, len(dataset) - 1, max_samples).round().astype(int))
    return dataset.with_format("numpy")


class Collator:
    """Rows -> a batch that is always (micro_batch_size, max_seq_len); a missing row has no targets."""

    def __init__(self, max_seq_len: int, micro_batch_size: int):
        self.max_seq_len = max_seq_len
        self.micro_batch_size = micro_batch_size

    def __call__(self, rows: list[dict]) -> dict:
        """Batch of B = micro_batch_size rows of T = max_seq_len tokens.

        input_ids, labels, position_ids: (B, T) int64; labels are shifted, IGNORED where there is no target.
        cu_seqlens: int32 bounds of the document pieces in the B * T tokens laid end to end.
        num_tokens: int, without the rows that were missing.
        """
        B, T = self.micro_batch_size, self.max_seq_len
        assert len(rows) <= B, f"{len(rows)} rows for a micro-batch of {B}"
        input_ids = np.zeros((B, T), dtype=np.int64)
        target = np.zeros((B, T), dtype=bool)  # may token t be predicted?
        starts = np.zeros((B, T), dtype=bool)  # does a document begin with token t?
        for b, row in enumerate(rows):
            input_ids[b] = row["input_ids"]
            target[b] = row.get("loss_mask", True)
            starts[b, row["document_starts"]] = True
        starts[:, 0] = True
        labels = np.full((B, T), IGNORED, dtype=np.int64)
        labels[:, :-1] = np.where((target & ~starts)[:, 1:], input_ids[:, 1:], IGNORED)
        bounds = np.flatnonzero(starts)  # row starts included
        cu_seqlens = np.append(bounds, B * T)
        position_ids = np.arange(B * T) - np.repeat(bounds, np.diff(cu_seqlens))
        batch = dict(input_ids=input_ids, labels=labels, position_ids=position_ids.reshape(B, T))
        batch["cu_seqlens"] = cu_seqlens.astype(np.int32)
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return dict(tensors, num_tokens=len(rows) * T)


def _save(paths: list[Path], folder: Path, dataset_id: str, settings: dict, skip_bad_samples: bool) -> None:
    """Splits and packs the documents, and saves both splits and preparation.json in `folder`/result."""
    T = settings["max_seq_len"]
    documents = pa.Table.from_batches(shards.read(*paths))
    problems = documents["problem"].drop_null()
    if len(problems) and not skip_bad_samples:
        what = f"{dataset_id} has {len(problems)} bad sample{'s' * (len(problems) > 1)}"
        examples = "\n  ".join(problems[:5].to_pylist())
        fix = "Mend or remove them, or leave them out with --skip_bad_samples."
        raise DataError(f"{what}:\n  {examples}\n{fix}")
    lengths = pc.list_value_length(documents["input_ids"]).to_numpy().astype(np.int64)
    keys, filled = documents["key"].to_numpy()[lengths > 0], lengths[lengths > 0]
    if filled.sum() < T:
        found = f"the source has {len(filled)} documents with {filled.sum()} tokens in all"
        fix = "give more text or a smaller --max_seq_len"
        raise DataError(f"{found}, fewer than one sample of --max_seq_len={T}: {fix}")
    bound = _held_out_below(keys, filled, T, settings["validation_fraction"])
    sizes = enumerate(np.bincount(np.frexp(filled)[1]).tolist())  # powers of two
    by_length = {f"{2**n // 2}-{2**n - 1}": count for n, count in sizes if count}
    known = dict(settings=settings, dataset_id=dataset_id, datasets=datasets.__version__)
    known |= dict(bad_samples=len(problems), empty_samples=int((lengths == 0).sum()) - len(problems))
    known |= dict(documents_by_length=by_length, max_token_id=0)
    known |= dict(documents={}, samples={}, tokens={}, dropped_tokens={})
    splits = DatasetDict()
    for split, chosen in (("train", keys >= bound), ("validation", keys < bound)):
        path = folder / f"{split}.arrow"
        samples = pa.Table.from_batches(shards.write(path, SAMPLE, _pack(paths, T, bound, split)), SAMPLE)
        splits[split] = Dataset.from_file(str(path))
        known["documents"][split] = int(chosen.sum())
        known["samples"][split] = len(samples)
        known["tokens"][split] = len(samples) * T
        known["dropped_tokens"][split] = int(filled[chosen].sum()) - len(samples) * T
        largest = pc.max(pc.list_flatten(samples["input_ids"])).as_py() or 0
        known["max_token_id"] = max(known["max_token_id"], largest)
    shutil.rmtree(folder / "result", ignore_errors=True)
    files = {split: 1 + rows.data.nbytes // FILE_BYTES for split, rows in splits.items()}
    splits.save_to_disk(str(folder / "result"), num_shards=files)
    (folder / "result" / "preparation.json").write_text(json.dumps(known, indent=2) + "\n")


def _held_out_below(keys: np.ndarray, lengths: np.ndarray, T: int, fraction: float) -> int:
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


def _pack(paths: list[Path], T: int, bound: int, split: str) -> Iterator[pa.RecordBatch]:
    """A split's documents end to end, cut every T tokens; what does not fill a sample is dropped."""
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
        counts, (_, starts) = rows["document_starts"].sum(1), np.nonzero(rows["document_starts"])
        cuts = pa.array(np.arange(0, whole + 1, T), pa.int32())
        start_cuts = pa.array(np.cumsum([0, *counts]), pa.int32())
        ids, mask = rows["input_ids"].ravel(), rows["loss_mask"].ravel().astype(np.uint8)
        lists = [(cuts, ids), (start_cuts, starts.astype(np.int32)), (cuts, mask)]
        yield pa.record_batch([pa.ListArray.from_arrays(*pair) for pair in lists], schema=SAMPLE)
        left = {name: values[whole:] for name, values in left.items()}


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises DataError if something else is there."""
    preparation = read_preparation(target)
    if preparation is None:
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise DataError(f"{target} exists and is not a prepared data set: choose another --dataset_path")
        return False
    known = preparation["settings"]
    words = {"source": "another source or changed files", "tokenizer": "another tokenizer"}
    pairs = ((name, known.get(name), value) for name, value in settings.items())
    changed = [words.get(name, f"{name} {old}, now {new}") for name, old, new in pairs if old != new]
    if changed:
        what = f"{target} holds {preparation['dataset_id']} with other settings ({'; '.join(changed)})"
        raise DataError(f"{what}: choose another --dataset_path, or remove the folder")
    samples = f"{preparation['samples']['train']:,} training samples"
    print(f"{target} is already prepared with these settings ({samples}): nothing to do")
    return True


def read_preparation(path: Path) -> dict | None:
    """What preparation.json says; None if there is none."""
    try:
        return json.loads((path / "preparation.json").read_text())
    except (OSError, ValueError):
        return None


def summary(path: Path, tokenizer) -> str:
    """Counts, the documents' lengths, and a sample in which what is learned stands in brackets."""
    known = read_preparation(path)
    lines = [
        f"prepared {path}, without {known['empty_samples']} empty and {known['bad_samples']} bad samples"
    ]
    for split in ("train", "validation"):
        names = ("documents", "tokens", "samples", "dropped_tokens")
        counts = ", ".join(f"{known[name][split]:,} {name.replace('_', ' ')}" for name in names)
        lines.append(f"  {split}: {counts}")
    sizes = ", ".join(f"{count:,} of {name}" for name, count in known["documents_by_length"].items())
    lines.append(f"  documents by length in tokens: {sizes}")
    for row in datasets.load_from_disk(str(path / "train")).take(100):
        learned = np.array(row["loss_mask"], bool)
        learned[row["document_starts"]] = False  # these are no targets
        if learned.any():
            break
    begin = max(0, int(learned.argmax()) - 40)  # somewhat before what is learned
    shown = slice(begin, begin + 160)
    runs = groupby(zip(row["input_ids"][shown], learned[shown], strict=True), key=lambda token: token[1])
    texts = ((tokenizer.decode([index for index, _ in run]), is_learned) for is_learned, run in runs)
    sample = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in texts)
    lines.append(f"  a sample, from its token {begin} (what is learned in [[ ]]):")
    return "\n".join(lines + ["    " + line for line in sample.splitlines()])


def _fingerprint(tokenizer) -> str:
    """Hash of what decides the token ids, the same in every version of the libraries."""
    ids = tokenizer("Hello, world!  1790's\n\tnaïve 中文 <|end_of_text|>")["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _hash([vocabulary, ids, document_separator(tokenizer), tokenizer.chat_template])


def _hash(value) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())
