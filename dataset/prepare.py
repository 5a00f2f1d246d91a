"""Prepares data: text or chats -> tokens -> samples of equal length in a DatasetDict on disk."""

import contextlib
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
from datasets import Dataset, DatasetDict
from filelock import FileLock

from dataset import preparation, shards, sources
from dataset.check import file_digest, value_digest, vocabulary_digest
from dataset.encode import Encoder
from dataset.pack import SAMPLE, held_out_below, pack
from dataset.preparation import FORMAT
from errors import UserError, naming

FILE_BYTES = 500 << 20  # of a saved split's files, about


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
    vocabulary = vocabulary_digest(tokenizer)
    encoding = value_digest([vocabulary, tokenizer.chat_template])
    settings = dict(format=FORMAT, source=source, tokenizer=encoding, text_column=text_column)
    settings |= dict(max_seq_len=max_seq_len, validation_fraction=validation_fraction, seed=seed)
    work = target.with_name(target.name + ".preparing")
    if work.exists():
        print(f"continuing in {work}, after any other process that prepares there")
    elif _already_prepared(target, settings):
        return target
    with _working_in(work):
        if not _already_prepared(target, settings):  # another process may have done it meanwhile
            folder = work / value_digest([settings, datasets.__version__])
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
    bound = held_out_below(keys, filled, T, known["settings"]["validation_fraction"])
    sizes = enumerate(np.bincount(np.frexp(filled)[1]).tolist())  # powers of two
    by_length = {f"{2**n // 2}-{2**n - 1}": count for n, count in sizes if count}
    known |= dict(datasets=datasets.__version__, bad_samples=len(problems))
    known |= dict(empty_samples=int((lengths == 0).sum()) - len(problems))
    known |= dict(documents_by_length=by_length, max_token_id=0)
    known |= dict(documents={}, samples={}, tokens={}, dropped_tokens={})
    splits = DatasetDict()
    for split, chosen in (("train", keys >= bound), ("validation", keys < bound)):
        path = folder / f"{split}.arrow"
        shards.write(path, SAMPLE, pack(paths, T, bound, split))
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
    known["files"] = {path.relative_to(result).as_posix(): file_digest(path) for path in saved}
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


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises UserError if something else is there."""
    earlier = preparation.read(target)
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


def summary(path: Path, tokenizer) -> str:
    """Counts, the documents' lengths, and a sample in which what is learned stands in brackets."""
    known = preparation.read(path)
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
