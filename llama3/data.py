"""Prepared data: text or chat -> samples of equal length on disk (`prepare`), and from there to batches (`open_split`, `Collator`).

Every byte of what `prepare` leaves follows from the source, the tokenizer and the settings alone, however often it was interrupted.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
import xxhash

from llama3.assets import document_separator
from llama3.loss import IGNORED

FORMAT = 1  # of the prepared folder; raised whenever the same input would give other bytes


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

    With the settings of an earlier preparation this does nothing, with others it refuses. Raises DataError and AssetError.
    """
    target = Path(dataset_path)
    target = target.resolve() if target.is_symlink() else target
    if not target.name or target.is_mount():
        raise DataError(
            f"--dataset_path={dataset_path} cannot be renamed into place: name a folder inside it"
        )
    if not 0 <= validation_fraction < 1:
        raise DataError(
            f"--validation_fraction is {validation_fraction}: give a fraction from 0 up to, but not, 1"
        )
    if max_seq_len < 2:
        raise DataError(f"--max_seq_len is {max_seq_len}: a sample needs at least 2 tokens")
    from llama3.sources import Source

    source = Source(dataset_id, text_column)
    settings = dict(
        format=FORMAT,
        source=source.identity or dataset_id,
        tokenizer=_fingerprint(tokenizer),
        max_seq_len=max_seq_len,
        validation_fraction=validation_fraction,
        seed=seed,
        text_column=text_column,
    )
    work = target.with_name(target.name + ".preparing")
    if work.exists() or not _already_prepared(target, settings):
        with _only_one(work):
            if not _already_prepared(target, settings):  # else another process did it while this one waited
                _prepare_alone(
                    source, tokenizer, target, work, settings, skip_bad_samples, num_proc or _cores()
                )
            shutil.rmtree(work, ignore_errors=True)
    return target


def open_split(
    dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples: int | None = None
):
    """Split 'train' or 'validation' as a datasets.Dataset of rows in numpy; of `max_samples`, always the same ones, evenly spaced.

    Raises DataError if it is not prepared, prepared with another sequence length, or with ids from `vocab_size` up.
    """
    path = Path(dataset_path)
    facts = _read_facts(path)
    fix = f"`python train.py --prepare_data --dataset_path={path} --max_seq_len={max_seq_len}` with this run's other data flags"
    if facts is None:
        raise DataError(f"{path} is not prepared: run {fix}")
    prepared = facts["settings"]["max_seq_len"]
    if prepared != max_seq_len:
        raise DataError(
            f"{path} holds samples of {prepared} tokens, --max_seq_len is {max_seq_len}: use --max_seq_len={prepared}, "
            f"or another --dataset_path, prepared by `python train.py --prepare_data --max_seq_len={max_seq_len}`"
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
    """Rows -> a batch that is always (micro_batch_size, max_seq_len): missing rows become rows without targets."""

    def __init__(self, max_seq_len: int, micro_batch_size: int):
        self.max_seq_len = max_seq_len
        self.micro_batch_size = micro_batch_size

    def __call__(self, rows: list[dict]) -> dict:
        """Batch of B = micro_batch_size rows of T = max_seq_len tokens.

        input_ids, labels, position_ids: (B, T) int64; labels are shifted, IGNORED where there is no target. cu_seqlens: int32 bounds
        of the document pieces in the B * T tokens laid end to end. num_tokens: int, without the rows that were missing.
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


def _prepare_alone(
    source, tokenizer, target: Path, work: Path, settings: dict, skip_bad_samples: bool, num_proc: int
) -> None:
    from llama3.packing import pack
    from llama3.tokenizing import Encoder, tokenize

    source.open()
    key = _hash([settings, source.identity or source.rows._fingerprint, datasets.__version__])
    for stale in work.iterdir():  # of other settings
        if stale.name != key:
            shutil.rmtree(stale)
    folder = work / key
    encoder = Encoder(tokenizer, settings["max_seq_len"] if source.joins_rows else 0)
    parts = tokenize(source, encoder, folder / "parts", num_proc)
    bad = sum(part["bad"] for part in parts)
    if bad and not skip_bad_samples:
        examples = "\n  ".join([example for part in parts for example in part["bad_examples"]][:5])
        what = f"{bad} bad sample{'s' * (bad > 1)}"
        raise DataError(
            f"{source.dataset_id} has {what}:\n  {examples}\nMend or remove them, or leave them out with --skip_bad_samples."
        )
    result = folder / "result"
    shutil.rmtree(result, ignore_errors=True)
    facts = dict(
        settings=settings,
        dataset_id=source.dataset_id,
        datasets=datasets.__version__,
        max_token_id=max(part["max_token_id"] for part in parts),
        empty_samples=sum(part["empty"] for part in parts),
        bad_samples=bad,
        **pack(folder, parts, result, settings, key),
    )
    (result / "preparation.json").write_text(json.dumps(facts, indent=2) + "\n")
    for path in result.rglob("*"):  # on disk before it is visible
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if target.is_dir():  # an empty one
        target.rmdir()
    result.rename(target)
    print(summary(target, tokenizer))


# ---- the prepared folder ----


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises DataError where something else is."""
    facts = _read_facts(target)
    if facts is None:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise DataError(f"{target} exists and is not a prepared data set: choose another --dataset_path")
        return False
    wanted = json.loads(json.dumps(settings))
    other = [name for name in wanted if facts["settings"].get(name) != wanted[name]]
    if other:
        short = {
            name: f"{name} {facts['settings'].get(name)}, now {wanted[name]}"
            for name in ("max_seq_len", "seed", "text_column")
        }
        short["source"] = f"another source or changed files (it was {facts['dataset_id']})"
        short["tokenizer"] = "another tokenizer"
        short["validation_fraction"] = f"validation_fraction {facts['settings'].get('validation_fraction')}"
        differences = "; ".join(short.get(name, name) for name in other)
        raise DataError(
            f"{target} is prepared with other settings ({differences}): choose another --dataset_path, or remove the folder to prepare anew"
        )
    left_out = f", {facts['bad_samples']} bad samples left out" if facts["bad_samples"] else ""
    print(
        f"{target} is already prepared with these settings ({facts['samples']['train']:,} training samples{left_out}): nothing to do"
    )
    return True


def _read_facts(path: Path) -> dict | None:
    try:
        return json.loads((path / "preparation.json").read_text())
    except (OSError, ValueError):
        return None


def summary(path: Path, tokenizer) -> str:
    """What was prepared, for a reader: counts, lengths of the documents, and a sample in which what is learned stands in brackets."""
    facts = _read_facts(path)
    lines = [f"prepared {path}"]
    for split in ("train", "validation"):
        counts = [facts[name][split] for name in ("documents", "tokens", "samples", "dropped_tokens")]
        lines.append(
            "  {:<10} {:>12,} documents {:>15,} tokens {:>10,} samples {:>8,} tokens dropped at the end".format(
                split, *counts
            )
        )
    lines.append(
        f"  {facts['empty_samples']:,} empty samples skipped, {facts['bad_samples']:,} bad samples left out"
    )
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
    probe = "Hello, world!  1790's\n\tnaïve 中文 <|end_of_text|>"
    ids = tokenizer(probe)["input_ids"]
    facts = [
        sorted(tokenizer.get_vocab().items()),
        ids,
        document_separator(tokenizer),
        tokenizer.chat_template,
    ]
    return _hash(facts)


def _hash(facts) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _only_one(work: Path):
    """Make the folder `work` and lock it, waiting for another process that has it; the kernel frees what a dead one held."""
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            handle = os.open(work, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{work} cannot be made ({error}): choose another --dataset_path") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is preparing in {work}: waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            if work.exists() and os.path.samestat(
                os.fstat(handle), work.stat()
            ):  # not removed by the one that was done
                yield
                return
        finally:
            os.close(handle)
