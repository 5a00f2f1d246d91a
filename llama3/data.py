"""Prepared data: text or chat -> samples of equal length on disk (`prepare`), and from there to batches."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset, DatasetDict
from filelock import FileLock, Timeout

from llama3 import shards, sources
from llama3.assets import document_separator
from llama3.encode import Encoder
from llama3.loss import IGNORED

FORMAT = 2  # of the prepared folder; raised whenever the same input would give other samples
FILE_BYTES = 500 << 20  # of a saved split's files, about


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
    """Tokenize, pack and split `dataset_id` into a DatasetDict at `dataset_path`, and print a summary.

    With the settings of an earlier preparation this does nothing, with others it refuses. After a kill it
    continues. Raises DataError, AssetError, EncodeError and ProcessKilled.
    """
    target = Path(dataset_path)
    target = target.resolve() if target.is_symlink() else target
    if not target.name or target.is_mount():
        raise DataError(
            f"--dataset_path={dataset_path} cannot be renamed into place: name a folder inside it"
        )
    if not 0 <= validation_fraction < 1:
        raise DataError(f"--validation_fraction is {validation_fraction}: give a fraction from 0 to below 1")
    if max_seq_len < 2:
        raise DataError(f"--max_seq_len is {max_seq_len}: a sample needs at least 2 tokens")
    files = sources.find_files(dataset_id)
    settings = dict(
        format=FORMAT,
        source=sources.identity(files) if files else dataset_id,
        tokenizer=_fingerprint(tokenizer),
        max_seq_len=max_seq_len,
        validation_fraction=validation_fraction,
        seed=seed,
        text_column=text_column,
    )
    work = target.with_name(target.name + ".preparing")
    if work.exists() or not _already_prepared(target, settings):
        with _only_one(work) as lock_file:
            if not _already_prepared(target, settings):  # another process may have done it meanwhile
                paths = _tokenize(dataset_id, files, tokenizer, settings, work, num_proc or _cores())
                index = _index(paths)
                _check(index, dataset_id, max_seq_len, skip_bad_samples)
                _publish(_pack(paths, index, dataset_id, settings), target)
                print(summary(target, tokenizer))
            shutil.rmtree(work, ignore_errors=True)
            lock_file.unlink(missing_ok=True)  # a process that still waits for it finds the data in place
    return target


def open_split(
    dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples: int | None = None
):
    """Split 'train' or 'validation' as a datasets.Dataset of rows in numpy.

    Of more than `max_samples` rows, always the same ones are taken, evenly spaced. Raises DataError if the
    data are not prepared, or with another sequence length, or with token ids from `vocab_size` up.
    """
    path = Path(dataset_path)
    facts = _read_facts(path)
    command = f"python train.py --prepare_data --max_seq_len={max_seq_len}"
    if facts is None:
        raise DataError(
            f"{path} is not prepared: run `{command} --dataset_path={path}` with this run's other data flags"
        )
    prepared = facts["settings"]["max_seq_len"]
    if prepared != max_seq_len:
        raise DataError(
            f"{path} holds samples of {prepared} tokens, --max_seq_len is {max_seq_len}: "
            f"use --max_seq_len={prepared}, or another --dataset_path, prepared by `{command}`"
        )
    if facts["max_token_id"] >= vocab_size:
        raise DataError(
            f"{path} has token id {facts['max_token_id']}, the model's vocabulary has {vocab_size}: "
            "prepare the data with the model's own tokenizer (--tokenizer_id, another --dataset_path)"
        )
    try:
        dataset = datasets.load_from_disk(str(path / split))
    except Exception as error:  # datasets raises all sorts of them for a damaged or newer folder
        raise DataError(
            f"{path}/{split} (datasets {facts['datasets']}) cannot be read: {error}. Prepare it again."
        ) from error
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
        starts = np.zeros((B, T), dtype=bool)
        starts[:, 0] = True
        for b, row in enumerate(rows):
            input_ids[b] = row["input_ids"]
            target[b] = row["loss_mask"] if "loss_mask" in row else True
            starts[b, row["document_starts"]] = True
        labels = np.full((B, T), IGNORED, dtype=np.int64)
        labels[:, :-1] = np.where((target & ~starts)[:, 1:], input_ids[:, 1:], IGNORED)
        bounds = np.flatnonzero(starts)  # row starts included
        cu_seqlens = np.append(bounds, B * T)
        position_ids = np.arange(B * T) - np.repeat(bounds, np.diff(cu_seqlens))
        return dict(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids.reshape(B, T)),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            num_tokens=len(rows) * T,
        )


# ---- from a source to samples


def _tokenize(dataset_id: str, files, tokenizer, settings: dict, work: Path, num_proc: int) -> list[Path]:
    """The tokenized shards of a source, in a folder of `work` that these settings alone use."""
    T, text_column = settings["max_seq_len"], settings["text_column"]
    rows = None if files else sources.load_from_hub(dataset_id, text_column)
    key = _hash([settings, rows is not None and rows._fingerprint, datasets.__version__])
    for stale in work.iterdir():
        if stale.name != key:
            shutil.rmtree(stale)
    join_tokens = 0
    if rows is None:
        blocks, read = shards.file_blocks(files, text_column, work / key)
    else:
        join_tokens = T if dataset_id in sources.BOOKCORPUS else 0
        blocks, read = shards.hub_blocks(rows, dataset_id, text_column, join_tokens)
    encoder = Encoder(tokenizer, join_tokens)
    count = min(shards.MAX_SHARDS, len(blocks))
    paths = [work / key / "shards" / f"{number:04}.arrow" for number in range(count)]
    shards.tokenize(blocks, lambda block: encoder.encode(read(block)), settings["seed"], paths, num_proc)
    return paths


class Index(NamedTuple):
    """The documents of all shards, n of them, and what is left out."""

    keys: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64, in tokens
    masked: bool  # is anything not to be learned?
    empty_samples: int
    bad_samples: int
    examples: list[str]  # of bad samples, the first few


def _index(paths: list[Path]) -> Index:
    keys, lengths, masked, empty, bad, examples = [], [], False, 0, 0, []
    for table in (Dataset.from_file(str(path)).data for path in paths):
        length = pc.list_value_length(table["input_ids"]).to_numpy()
        problems = table["problem"].drop_null()
        keys.append(table["key"].to_numpy()[length > 0])
        lengths.append(length[length > 0])
        masked |= pc.min(pc.list_flatten(table["loss_mask"])).as_py() == 0
        empty += int((length == 0).sum()) - len(problems)
        bad += len(problems)
        examples += problems[: 5 - len(examples)].to_pylist()
    return Index(np.concatenate(keys), np.concatenate(lengths, dtype=np.int64), masked, empty, bad, examples)


def _check(index: Index, dataset_id: str, T: int, skip_bad_samples: bool) -> None:
    if index.bad_samples and not skip_bad_samples:
        examples = "\n  ".join(index.examples)
        what = f"{index.bad_samples} bad sample{'s' * (index.bad_samples > 1)}"
        fix = "Mend or remove them, or leave them out with --skip_bad_samples."
        raise DataError(f"{dataset_id} has {what}:\n  {examples}\n{fix}")
    if index.lengths.sum() < T:
        raise DataError(
            f"the source has {len(index.lengths)} documents with {index.lengths.sum()} tokens in all, "
            f"fewer than one sample of --max_seq_len={T}: give more text or a smaller --max_seq_len"
        )


def _held_out_below(index: Index, T: int, fraction: float) -> int:
    """Documents with a smaller key than this are held out, so that equal documents are on the same side.

    They are the wanted fraction of the documents, or as many more as fill one sample.
    """
    if fraction == 0:
        return 0
    order = np.argsort(index.keys)
    wanted = max(1, round(fraction * len(order)))
    full = 1 + np.searchsorted(np.cumsum(index.lengths[order]), T)
    bound = 1 + int(index.keys[order][: max(wanted, full)][-1])
    if index.lengths[index.keys >= bound].sum() < T:
        print("warning: too little text to hold documents out for validation, all of it is for training")
        return 0
    return bound


def _pack(paths: list[Path], index: Index, dataset_id: str, settings: dict) -> Path:
    """Save both splits and preparation.json in a folder beside the shards."""
    T, folder = settings["max_seq_len"], paths[0].parent.parent
    bound = _held_out_below(index, T, settings["validation_fraction"])
    options = dict(paths=tuple(map(str, paths)), T=T, bound=bound, masked=index.masked)
    splits, counts, rows_at_once = DatasetDict(), {}, 1 + (1 << 20) // T
    for split, chosen in (("train", index.keys >= bound), ("validation", index.keys < bound)):
        samples, dropped = divmod(int(index.lengths[chosen].sum()), T)
        if samples:
            splits[split] = shards.generated(_samples, folder, rows_at_once, split=split, **options)
        else:
            splits[split] = splits["train"].select([])
        targets = _reduce(pc.sum, splits[split], "loss_mask") if index.masked else samples * T
        counts[split] = dict(documents=int(chosen.sum()), samples=samples, tokens=samples * T)
        counts[split] |= dict(dropped_tokens=dropped, target_tokens=targets)
    shutil.rmtree(folder / "result", ignore_errors=True)
    files = {split: 1 + rows.data.nbytes // FILE_BYTES for split, rows in splits.items()}
    splits.save_to_disk(str(folder / "result"), num_shards=files)
    bins = np.bincount(np.frexp(index.lengths)[1])  # powers of two
    facts = dict(
        settings=settings,
        dataset_id=dataset_id,
        datasets=datasets.__version__,
        **{name: {split: counts[split][name] for split in counts} for name in counts["train"]},
        documents_by_length={f"{2**n // 2}-{2**n - 1}": int(count) for n, count in enumerate(bins) if count},
        empty_samples=index.empty_samples,
        bad_samples=index.bad_samples,
        max_token_id=max(_reduce(pc.max, rows, "input_ids") for rows in splits.values()),
    )
    (folder / "result" / "preparation.json").write_text(json.dumps(facts, indent=2) + "\n")
    return folder / "result"


def _reduce(function, rows: Dataset, column: str) -> int:
    """Sum or maximum of a column of lists; 0 without rows."""
    return function(pc.list_flatten(rows.data[column])).as_py() or 0


def _samples(paths: tuple[str, ...], T: int, bound: int, masked: bool, split: str) -> Iterator[dict]:
    """The documents of a split end to end, cut every T tokens; what does not fill a sample is dropped."""
    ids, mask, starts = np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int64)
    for batch in (batch for path in paths for batch in Dataset.from_file(path).data.to_batches()):
        lengths = pc.list_value_length(batch["input_ids"]).to_numpy()
        chosen = (batch["key"].to_numpy() < bound) == (split == "validation")
        tokens = np.repeat(chosen, lengths)
        lengths = lengths[chosen & (lengths > 0)]
        starts = np.concatenate([starts, len(ids) + np.cumsum(lengths) - lengths])
        ids = np.concatenate([ids, batch["input_ids"].flatten().to_numpy()[tokens]])
        mask = np.concatenate([mask, batch["loss_mask"].flatten().to_numpy()[tokens]])
        whole = len(ids) // T * T
        for begin in range(0, whole, T):
            here = starts[slice(*np.searchsorted(starts, (begin, begin + T)))] - begin
            here = np.union1d([0], here).astype(np.int32)  # 0 even where the sample continues a document
            sample = dict(input_ids=ids[begin : begin + T], document_starts=here)
            yield sample | dict(loss_mask=mask[begin : begin + T]) if masked else sample
        ids, mask, starts = ids[whole:], mask[whole:], starts[starts >= whole] - whole


def _publish(result: Path, target: Path) -> None:
    """Flush all files to the disk, then rename their folder into place."""
    for path in result.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if target.is_dir():  # an empty one
        target.rmdir()
    result.rename(target)


# ---- the prepared folder


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises DataError where something else is."""
    facts = _read_facts(target)
    if facts is None:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise DataError(f"{target} exists and is not a prepared data set: choose another --dataset_path")
        return False
    known = facts["settings"]
    words = dict(
        source=f"another source or changed files (it was {facts['dataset_id']})",
        tokenizer="another tokenizer",
    )
    differences = [
        words.get(name, f"{name} {known.get(name)}, now {value}")
        for name, value in json.loads(json.dumps(settings)).items()
        if known.get(name) != value
    ]
    if differences:
        raise DataError(
            f"{target} is prepared with other settings ({'; '.join(differences)}): "
            "choose another --dataset_path, or remove the folder to prepare anew"
        )
    left_out = f", {facts['bad_samples']} bad samples left out" if facts["bad_samples"] else ""
    samples = f"{facts['samples']['train']:,} training samples{left_out}"
    print(f"{target} is already prepared with these settings ({samples}): nothing to do")
    return True


def _read_facts(path: Path) -> dict | None:
    try:
        return json.loads((path / "preparation.json").read_text())
    except (OSError, ValueError):
        return None


def summary(path: Path, tokenizer) -> str:
    """Counts, the documents' lengths, and a sample in which what is learned stands in brackets."""
    facts = _read_facts(path)
    lines = [f"prepared {path}"]
    for split in ("train", "validation"):
        documents, tokens, samples, dropped = (
            facts[name][split] for name in ("documents", "tokens", "samples", "dropped_tokens")
        )
        counts = f"{documents:>12,} documents {tokens:>15,} tokens {samples:>10,} samples {dropped:>8,}"
        lines.append(f"  {split:<10} {counts} tokens dropped at the end")
    empty, bad = facts["empty_samples"], facts["bad_samples"]
    lines.append(f"  {empty:,} empty samples skipped, {bad:,} bad samples left out")
    lines.append("  documents by length in tokens:")
    most = max(facts["documents_by_length"].values())
    for name, count in facts["documents_by_length"].items():
        lines.append(f"    {name:>17} {count:>12,} {'#' * max(1, round(40 * count / most))}")
    for row in datasets.load_from_disk(str(path / "train")).take(100):
        learned = Collator(len(row["input_ids"]), 1)([row])["labels"][0].numpy() != IGNORED
        learned = np.concatenate([[False], learned[:-1]])
        if learned.any():
            break
    begin = max(0, int(learned.argmax()) - 40)  # somewhat before what is learned
    ids, learned = row["input_ids"][begin : begin + 160], learned[begin : begin + 160]
    lines.append(f"  a sample, from its token {begin} (what is learned in [[ ]]):")
    changes = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(learned)]
    runs = [(tokenizer.decode(ids[a:b]), learned[a]) for a, b in zip(changes, changes[1:], strict=False)]
    sample = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in runs)
    return "\n".join(lines + ["    " + line for line in sample.splitlines()])


def _fingerprint(tokenizer) -> str:
    """Hash of what decides the token ids, the same in every version of the libraries."""
    ids = tokenizer("Hello, world!  1790's\n\tnaïve 中文 <|end_of_text|>")["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _hash([vocabulary, ids, document_separator(tokenizer), tokenizer.chat_template])


def _hash(facts) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _only_one(work: Path) -> Iterator[Path]:
    """Make the folder `work` and lock it, waiting for another process that has it; gives the lock's file."""
    lock = FileLock(work.with_name(work.name + ".lock"))
    try:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"another process is preparing in {work}: waiting for it")
            lock.acquire()
    except OSError as error:
        raise DataError(f"{work} cannot be made ({error}): choose another --dataset_path") from error
    try:
        yield Path(lock.lock_file)
    finally:
        lock.release()
