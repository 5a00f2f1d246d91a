"""Prepared data: text or chat -> samples of equal length on disk (`prepare`), and from there to batches."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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
from tokenizers.pre_tokenizers import ByteLevel

from errors import UserError
from llama3 import preparation, shards, sources
from llama3.assets import document_separator, naming
from llama3.encode import Encoder
from llama3.loss import IGNORED
from llama3.preparation import FORMAT, PREPARE
from llama3.preparation import read as read_preparation
from llama3.preparation import require as _preparation

FILE_BYTES = 500 << 20  # of a saved split's files, about
INDICES = pa.list_(pa.int32())
SAMPLE = pa.schema({"input_ids": INDICES, "document_starts": INDICES, "loss_mask": pa.list_(pa.uint8())})


def prepare(
    dataset_id: str,
    tokenizer,
    dataset_path: str | Path,
    max_seq_len: int,
    validation_fraction: float = 0.01,
    seed: int = 0,
    text_column: str | None = None,
    skip_bad_samples: bool = False,
    num_proc: int = 1,
) -> Path:
    """Tokenizes, packs and splits `dataset_id` into a DatasetDict at `dataset_path`, and prints a summary.

    With the settings of an earlier preparation it does nothing, with others it refuses. After a kill it
    continues. Raises UserError, and Unfinished if the same command can continue.
    """
    target = Path(dataset_path).resolve()
    files = sources.find_files(dataset_id)
    source = sources.identity(files) if files else dataset_id
    vocabulary = _vocabulary(tokenizer)
    encoding = _hash([vocabulary, tokenizer.chat_template])
    settings = dict(format=FORMAT, source=source, tokenizer=encoding, text_column=text_column)
    settings |= dict(max_seq_len=max_seq_len, validation_fraction=validation_fraction, seed=seed)
    work = target.with_name(target.name + ".preparing")
    if work.exists():
        print(f"continuing in {work}, after any other process that prepares there")
    elif _already_prepared(target, settings):
        return target
    with _working_in(work):
        if not _already_prepared(target, settings):  # another process may have done it meanwhile
            folder = work / _hash([settings, datasets.__version__])
            for stale in {*work.glob("*")} - {folder}:
                shutil.rmtree(stale)
            documents = sources.read_documents(dataset_id, files, text_column)
            joins = not files and dataset_id.partition(":")[0] in sources.BOOKCORPUS
            encoder = Encoder(tokenizer, max_seq_len if joins else 0)
            paths = shards.tokenize(documents, encoder, seed, folder, num_proc)
            known = dict(settings=settings, dataset_id=dataset_id, tokenizer_id=tokenizer.name_or_path)
            known["vocabulary"] = vocabulary
            with naming(folder):
                _save(paths, folder, known, skip_bad_samples)
            os.sync()  # so that the folder is whole even after a power cut
            (folder / "result").rename(target)
            print(summary(target, tokenizer))
    return target


@contextlib.contextmanager
def _working_in(work: Path) -> Iterator[None]:
    """Locks the folder, and removes it at the end unless the preparation can be continued there."""
    with FileLock(f"{work}.lock"):
        done = False
        try:
            yield
            done = True
        except UserError as error:
            done = not isinstance(error, shards.Unfinished)  # the same command would fail again
            raise
        finally:
            if done:
                shutil.rmtree(work, ignore_errors=True)
                Path(f"{work}.lock").unlink(missing_ok=True)  # who still waits finds the data in place


def open_split(
    dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples=None, command=PREPARE
) -> Dataset:
    """Opens a split as rows in numpy, of more than `max_samples` always the same ones. Raises UserError."""
    path, known = Path(dataset_path), _preparation(Path(dataset_path), command)
    preparation.check_length(path, known, max_seq_len)
    if known["max_token_id"] >= vocab_size:
        raise UserError(
            f"{path} has token id {known['max_token_id']}, and the model's vocabulary has {vocab_size}",
            "Prepare the data with the model's own tokenizer (--tokenizer_id, another --dataset_path)",
        )
    try:
        dataset = datasets.load_from_disk(str(path / split))
    except Exception as error:  # datasets raises many kinds for a damaged or newer folder
        raise UserError(
            f"{path}/{split}, saved by datasets {known['datasets']}, cannot be read: {error}",
            f"Remove {path} and prepare it again",
        ) from error
    if max_samples is not None and len(dataset) > max_samples:
        dataset = dataset.select(np.linspace(0, len(dataset) - 1, max_samples).round().astype(int))
    return dataset.with_format("numpy")


def verify(dataset_path: str | Path, part: int = 0, parts: int = 1) -> None:
    """Compares the files `part`, `part` + `parts`, ... with their checksums. Raises UserError."""
    path = Path(dataset_path)
    for name, digest in sorted(_preparation(path)["files"].items())[part::parts]:
        found = _digest(path / name) if (path / name).is_file() else "no file"
        if found != digest:
            raise UserError(
                f"{path / name} does not match its checksum {digest} (got {found})",
                f"Remove {path} and prepare it again",
            )


def fingerprint(dataset_path: str | Path) -> str:
    """Hash of what was prepared, the same on every machine and at any time. Raises UserError."""
    known = _preparation(Path(dataset_path))
    # The source's hash has a large file's time, and the files of datasets that are not samples have paths.
    settings = {name: value for name, value in known["settings"].items() if name != "source"}
    return _hash([settings, {name: known["files"][name] for name in known["files"] if ".arrow" in name}])


def check_prepared(dataset_path: str | Path, tokenizer, **given) -> None:
    """Compares data with a training's tokenizer, and with these flags as prepared. Raises UserError."""
    path, known = Path(dataset_path), _preparation(Path(dataset_path))
    if known["vocabulary"] != _vocabulary(tokenizer):
        before, now = known["tokenizer_id"], tokenizer.name_or_path
        raise UserError(
            f"{path} was prepared with another tokenizer ({before}) than {now}",
            f"Train with --tokenizer_id={before}, or prepare the data with {now} at another --dataset_path",
        )
    for name, value in given.items():
        if _plain(value) != _plain(before := {**known, **known["settings"]}[name]):
            raise UserError(
                f"{path} was prepared with {name} {before}, and --{name} is {value}",
                f"Leave --{name} out, or prepare with it at another --dataset_path",
            )


def _plain(value):
    """A flag in one spelling: ./texts and texts/ are the same."""
    if not isinstance(value, str):
        return value
    return [os.path.abspath(part.strip()) for part in value.split(",")]


@dataclass
class Collator:
    """Rows -> a batch that is always (micro_batch_size, max_seq_len); a missing row has no targets."""

    max_seq_len: int
    micro_batch_size: int

    def __call__(self, rows: list[dict]) -> dict:
        """Batch of B = micro_batch_size rows of T = max_seq_len tokens.

        input_ids, labels, position_ids: (B, T) int64; labels are shifted, IGNORED where there is no target.
        cu_seqlens: int32 bounds of the document pieces in the B * T tokens laid end to end.
        longest_document: int, the tokens of the longest piece.
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
        lengths = np.diff(cu_seqlens)
        position_ids = np.arange(B * T) - np.repeat(bounds, lengths)
        batch = dict(input_ids=input_ids, labels=labels, position_ids=position_ids.reshape(B, T))
        batch["cu_seqlens"] = cu_seqlens.astype(np.int32)
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return dict(tensors, longest_document=int(lengths.max()), num_tokens=len(rows) * T)


def _save(paths: list[Path], folder: Path, known: dict, skip_bad_samples: bool) -> None:
    """Splits and packs the documents, and saves both splits and preparation.json in `folder`/result."""
    T = known["settings"]["max_seq_len"]
    documents = pa.Table.from_batches(shards.read(*paths))
    problems = documents["problem"].drop_null()
    if not skip_bad_samples:
        _check_problems(problems, known["dataset_id"], folder)
    lengths = pc.list_value_length(documents["input_ids"]).to_numpy().astype(np.int64)
    keys, filled = documents["key"].to_numpy()[lengths > 0], lengths[lengths > 0]
    if filled.sum() < T:
        raise UserError(
            f"the source has {len(filled)} documents with {filled.sum()} tokens in all, fewer than one "
            f"sample of --max_seq_len={T}",
            "Give more text or a smaller --max_seq_len",
        )
    bound = _held_out_below(keys, filled, T, known["settings"]["validation_fraction"])
    sizes = enumerate(np.bincount(np.frexp(filled)[1]).tolist())  # powers of two
    by_length = {f"{2**n // 2}-{2**n - 1}": count for n, count in sizes if count}
    known |= dict(datasets=datasets.__version__, bad_samples=len(problems))
    known |= dict(empty_samples=int((lengths == 0).sum()) - len(problems))
    known |= dict(documents_by_length=by_length, max_token_id=0)
    known |= dict(documents={}, samples={}, tokens={}, dropped_tokens={})
    splits = DatasetDict()
    for split, chosen in (("train", keys >= bound), ("validation", keys < bound)):
        path = folder / f"{split}.arrow"
        shards.write(path, SAMPLE, _pack(paths, T, bound, split))
        splits[split] = samples = Dataset.from_file(str(path))
        if split == "train" and not len(samples):
            raise UserError(
                f"every sample of {T} tokens from {known['dataset_id']} is fully masked",
                "Give answers, or raise --max_seq_len above the length of the prompts",
            )
        known["documents"][split] = int(chosen.sum())
        known["samples"][split] = len(samples)
        known["tokens"][split] = len(samples) * T
        known["dropped_tokens"][split] = int(filled[chosen].sum()) - len(samples) * T
        largest = pc.max(pc.list_flatten(samples.data["input_ids"])).as_py() or 0
        known["max_token_id"] = max(known["max_token_id"], largest)
    result = folder / "result"
    shutil.rmtree(result, ignore_errors=True)
    num_shards = {split: 1 + rows.data.nbytes // FILE_BYTES for split, rows in splits.items()}
    splits.save_to_disk(str(result), num_shards=num_shards)
    saved = (path for path in sorted(result.rglob("*")) if path.is_file())
    known["files"] = {path.relative_to(result).as_posix(): _digest(path) for path in saved}
    (result / ".gitignore").write_text("*\n")
    (result / "preparation.json").write_text(json.dumps(known, indent=2) + "\n")


def _check_problems(problems: pa.ChunkedArray, dataset_id: str, folder: Path) -> None:
    """Raise Unfinished if there are bad samples."""
    if len(problems) == 0:
        return
    examples = "".join(f"\n  {problem}" for problem in problems[:5].to_pylist())
    raise shards.Unfinished(
        f"{dataset_id} has bad samples ({len(problems)}):{examples}\n{folder.parent} keeps what is tokenized",
        "Mend or remove them, or leave them out with --skip_bad_samples",
    )


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


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises UserError if something else is there."""
    earlier = read_preparation(target)
    if earlier is None:
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise UserError(
                f"{target} exists and is not a prepared data set", "Choose another --dataset_path"
            )
        return False
    known = earlier["settings"]
    words = {"source": "another source or changed files", "tokenizer": "another tokenizer"}
    pairs = ((name, known.get(name), value) for name, value in settings.items())
    changed = [words.get(name, f"{name} {old}, now {new}") for name, old, new in pairs if old != new]
    if changed:
        raise UserError(
            f"{target} holds {earlier['dataset_id']} with other settings ({'; '.join(changed)})",
            "Choose another --dataset_path, or remove the folder",
        )
    samples = f"{earlier['samples']['train']:,} training samples"
    print(f"{target} is already prepared with these settings ({samples}): nothing to do")
    return True


def holds_conversations(path: str | Path) -> bool:
    """Do the first samples have tokens that are not learned? Texts are learned whole."""
    return any(0 in row["loss_mask"] for row in datasets.load_from_disk(str(Path(path, "train"))).take(100))


def summary(path: Path, tokenizer) -> str:
    """Counts, the documents' lengths, and a sample in which what is learned stands in brackets."""
    known = read_preparation(path)
    without = f"{known['empty_samples']} empty and {known['bad_samples']} bad samples"
    lines = [f"prepared {path}, without {without}"]
    for split in ("train", "validation"):
        names = ("documents", "tokens", "samples", "dropped_tokens")
        counts = ", ".join(f"{known[name][split]:,} {name.replace('_', ' ')}" for name in names)
        lines.append(f"  {split}: {counts}")
    sizes = ", ".join(f"{count:,} of {name}" for name, count in known["documents_by_length"].items())
    lines.append(f"  documents by length in tokens: {sizes}")
    kept, dropped = (sum(known[name].values()) for name in ("tokens", "dropped_tokens"))
    if dropped > kept / 9:
        what = f"{dropped:,} of {kept + dropped:,} tokens fill no sample, or one with nothing to learn"
        lines.append(f"warning: {what}, and are dropped: give more text or another --max_seq_len")
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


def bits_per_byte(rows, tokenizer, loss: float) -> float:
    """The loss, in nats per target, as bits per byte of the targets' text; control tokens are no text.

    Raises UserError if the tokenizer's tokens are not bytes, or the targets have no text.
    """
    backend, alphabet = tokenizer.backend_tokenizer, {*ByteLevel.alphabet()}
    added = tokenizer.added_tokens_decoder
    sizes = np.zeros(1 + max(tokenizer.get_vocab().values()), np.int64)  # bytes of each token
    for text, index in backend.get_vocab(with_added_tokens=False).items():
        if not alphabet.issuperset(text) and index not in added:
            raise UserError(
                f"{tokenizer.name_or_path} has token {text!r}, which does not stand for bytes",
                "Use a byte-level tokenizer",
            )
        sizes[index] = len(text)  # each character stands for a byte
    for index, token in added.items():
        sizes[index] = 0 if token.special else len(token.content.encode())
    collate, targets, size = Collator(len(rows[0]["input_ids"]), 1), 0, 0
    for row in rows:
        labels = collate([row])["labels"].numpy()
        learned = labels[labels != IGNORED]
        targets, size = targets + len(learned), size + int(sizes[learned].sum())
    if not size:
        raise UserError("the validation samples have no text to predict", "Prepare other data")
    return loss * targets / (math.log(2) * size)


def _vocabulary(tokenizer) -> str:
    """Hash of what decides a text's token ids, the same in every version of the libraries."""
    ids = tokenizer("Hello, world!  1790's\n\tnaïve 中文 <|end_of_text|>")["input_ids"]
    return _hash([sorted(tokenizer.get_vocab().items()), ids, document_separator(tokenizer)])


def _hash(value) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while content := file.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()
