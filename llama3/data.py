"""Prepared data: text or chat -> samples of equal length on disk (`prepare`), and from there to batches."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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
    """Tokenizes, packs and splits `dataset_id` into a DatasetDict at `dataset_path`, and prints a summary.

    With the settings of an earlier preparation it does nothing, with others it refuses. After a kill it
    continues. Raises DataError, EncodeError and AssetError.
    """
    target = Path(dataset_path).resolve()
    if target.is_mount():
        raise DataError(
            f"--dataset_path={dataset_path} cannot be renamed into place: name a folder inside it"
        )
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
    if not work.exists() and _already_prepared(target, settings):
        return target
    with _only_one(work):
        if not _already_prepared(target, settings):  # another process may have done it meanwhile
            folder = work / _hash([settings, datasets.__version__])
            for stale in work.iterdir():
                if stale != folder:
                    shutil.rmtree(stale)
            source = dict(
                dataset_id=dataset_id, files=files and tuple(map(str, files)), text_column=text_column
            )
            encoder = Encoder(tokenizer, max_seq_len if dataset_id in sources.BOOKCORPUS else 0)
            paths = shards.tokenize(source, encoder, seed, folder, num_proc or len(os.sched_getaffinity(0)))
            _pack(paths, folder, dataset_id, settings, skip_bad_samples)
            _publish(folder / "result", target)
            print(summary(target, tokenizer))
        shutil.rmtree(work, ignore_errors=True)
        Path(f"{work}.lock").unlink(missing_ok=True)  # a process that still waits finds the data in place
    return target


def open_split(
    dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples: int | None = None
):
    """Opens 'train' or 'validation' as a datasets.Dataset of rows in numpy.

    Of more than `max_samples` rows, it takes always the same ones, evenly spaced. Raises DataError if the data
    are not prepared, or with another sequence length, or with token ids from `vocab_size` up.
    """
    path, command = Path(dataset_path), f"python train.py --prepare_data --max_seq_len={max_seq_len}"
    facts = read_preparation(path)
    if facts is None:
        fix = f"run `{command} --dataset_path={path}` with this run's other data flags"
        raise DataError(f"{path} is not prepared: {fix}")
    if (prepared := facts["settings"]["max_seq_len"]) != max_seq_len:
        fix = f"use --max_seq_len={prepared}, or another --dataset_path, prepared by `{command}`"
        raise DataError(f"{path} holds samples of {prepared} tokens, --max_seq_len is {max_seq_len}: {fix}")
    if (largest := facts["max_token_id"]) >= vocab_size:
        fix = "prepare the data with the model's own tokenizer (--tokenizer_id, another --dataset_path)"
        raise DataError(f"{path} has token id {largest}, the model's vocabulary has {vocab_size}: {fix}")
    try:
        dataset = datasets.load_from_disk(str(path / split))
    except Exception as error:  # datasets raises many kinds for a damaged or newer folder
        written = f"{path}/{split} (datasets {facts['datasets']})"
        raise DataError(f"{written} cannot be read: {error}. Prepare it again.") from error
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


# ---- from tokenized documents to samples


def _pack(paths: list[Path], folder: Path, dataset_id: str, settings: dict, skip_bad_samples: bool) -> None:
    """Splits and packs the documents, and saves both splits and preparation.json in `folder`/result."""
    T, result = settings["max_seq_len"], folder / "result"
    documents = datasets.concatenate_datasets([Dataset.from_file(str(path)) for path in paths]).data
    problems = documents["problem"].drop_null()
    if problems and not skip_bad_samples:
        what = f"{len(problems)} bad sample{'s' * (len(problems) > 1)}"
        examples = "\n  ".join(problems[:5].to_pylist())
        fix = "Mend or remove them, or leave them out with --skip_bad_samples."
        raise DataError(f"{dataset_id} has {what}:\n  {examples}\n{fix}")
    lengths = pc.list_value_length(documents["input_ids"]).to_numpy().astype(np.int64)
    empty = int((lengths == 0).sum()) - len(problems)
    keys, lengths = documents["key"].to_numpy()[lengths > 0], lengths[lengths > 0]
    if lengths.sum() < T:
        found = f"the source has {len(lengths)} documents with {lengths.sum()} tokens in all"
        fix = "give more text or a smaller --max_seq_len"
        raise DataError(f"{found}, fewer than one sample of --max_seq_len={T}: {fix}")
    bound = _held_out_below(keys, lengths, T, settings["validation_fraction"])
    masked = pc.min(pc.list_flatten(documents["loss_mask"])).as_py() == 0
    options = dict(paths=tuple(map(str, paths)), T=T, bound=bound, masked=masked)
    splits, counts = DatasetDict(), {}
    for split, chosen in (("train", keys >= bound), ("validation", keys < bound)):
        samples, dropped = divmod(int(lengths[chosen].sum()), T)
        if samples:
            splits[split] = shards.generate(
                _samples, folder, 1 + (1 << 20) // T, None, split=split, **options
            )
        else:
            splits[split] = splits["train"].select([])
        targets = _reduce(pc.sum, splits[split], "loss_mask") if masked else samples * T
        counts[split] = dict(documents=int(chosen.sum()), samples=samples, tokens=samples * T)
        counts[split] |= dict(dropped_tokens=dropped, target_tokens=targets)
    shutil.rmtree(result, ignore_errors=True)
    files = {split: 1 + rows.data.nbytes // FILE_BYTES for split, rows in splits.items()}
    splits.save_to_disk(str(result), num_shards=files)
    facts = dict(settings=settings, dataset_id=dataset_id, datasets=datasets.__version__)
    facts |= {name: {split: counts[split][name] for split in counts} for name in counts["train"]}
    facts |= dict(empty_samples=empty, bad_samples=len(problems))
    bins = np.bincount(np.frexp(lengths)[1])  # powers of two
    facts["documents_by_length"] = {
        f"{2**n // 2}-{2**n - 1}": int(count) for n, count in enumerate(bins) if count
    }
    facts["max_token_id"] = max(_reduce(pc.max, rows, "input_ids") for rows in splits.values())
    (result / "preparation.json").write_text(json.dumps(facts, indent=2) + "\n")


def _held_out_below(keys: np.ndarray, lengths: np.ndarray, T: int, fraction: float) -> int:
    """The bound below which a document's key puts it into the validation split; equal documents have equal keys.

    The split gets the wanted fraction of the documents, or as many more as fill one sample.
    """
    if fraction == 0:
        return 0
    order = np.argsort(keys)
    wanted = max(1, round(fraction * len(order)), 1 + np.searchsorted(np.cumsum(lengths[order]), T))
    bound = 1 + int(keys[order][:wanted][-1])
    if lengths[keys >= bound].sum() < T:
        print("warning: too little text to hold documents out for validation, all of it is for training")
        return 0
    return bound


def _reduce(function, rows: Dataset, column: str) -> int:
    """Sum or maximum of a column of lists; 0 without rows."""
    return function(pc.list_flatten(rows.data[column])).as_py() or 0


def _samples(paths: tuple[str, ...], T: int, bound: int, masked: bool, split: str) -> Iterator[dict]:
    """A split's documents end to end, cut every T tokens; what does not fill a sample is dropped."""
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
    """Flushes all files to the disk, then renames their folder into place."""
    for path in result.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if target.is_dir():  # an empty one
        target.rmdir()
    result.rename(target)


# ---- the prepared folder


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises DataError if something else is there."""
    facts = read_preparation(target)
    if facts is None:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise DataError(f"{target} exists and is not a prepared data set: choose another --dataset_path")
        return False
    known = facts["settings"]
    words = dict(source=f"another source or changed files (it was {facts['dataset_id']})")
    words["tokenizer"] = "another tokenizer"
    wanted = json.loads(json.dumps(settings))
    changed = [
        words.get(n, f"{n} {known.get(n)}, now {value}")
        for n, value in wanted.items()
        if known.get(n) != value
    ]
    if changed:
        fix = "choose another --dataset_path, or remove the folder to prepare anew"
        raise DataError(f"{target} is prepared with other settings ({'; '.join(changed)}): {fix}")
    left_out = f", {facts['bad_samples']} bad samples left out" if facts["bad_samples"] else ""
    samples = f"{facts['samples']['train']:,} training samples{left_out}"
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
    facts = read_preparation(path)
    lines = [f"prepared {path}"]
    for split in ("train", "validation"):
        names = ("documents", "tokens", "samples", "dropped_tokens")
        documents, tokens, samples, dropped = (facts[name][split] for name in names)
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


def _hash(value) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


@contextlib.contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Makes the folder `work` and locks it, waiting for another process that has it."""
    lock = FileLock(f"{work}.lock")
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
        work.mkdir(exist_ok=True)  # the other process has removed it
        yield
    finally:
        lock.release()
