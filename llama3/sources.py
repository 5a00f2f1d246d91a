"""Where text comes from: local files, the packaged speeches or a hub data set, as chunks of documents that a worker reads by itself."""

import functools
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llama3.assets import AssetError, from_hub, sotu_folder

CHUNK_BYTES = 2 << 20  # of text that a worker tokenizes at a time; part of what fixes the result's bytes
READ_BYTES = 1 << 18  # of a source read at once
PIECE_BYTES = 1 << 20  # of a long document tokenized at once
MAX_LINE_BYTES = 256 << 20
KINDS = (".txt", ".jsonl", ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd"}
ROLES = ("system", "user", "assistant", "tool")
# Where every byte-level tokenizer begins a word: after a letter, before one space and a letter, or before a punctuation mark.
SAFE_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_]|[^\w\s])")
# A script data set that datasets 4 and later refuse; its rows are sentences.
BOOKCORPUS = ("bookcorpus/bookcorpus", "bookcorpus")
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a data set


class BadSample(ValueError):
    """A sample that cannot be used; the message says what is wrong with it."""


class Piece(NamedTuple):
    """Part of a source: bytes of a .txt, whole lines of a .jsonl, a table of rows, or the BadSample that says why it cannot be read."""

    name: str
    first: int  # line or row, from 1
    content: bytes | pa.Table | BadSample
    starts: bool | None = None  # of a .txt: does a document start here?
    ends: bool | None = None


class Chunk(NamedTuple):
    """What one worker tokenizes into one part; `progress` is how many bytes of the source it stands for."""

    pieces: list[Piece]
    progress: int = 0


class Document(NamedTuple):
    """A document or a piece of one: text, the messages of a conversation, None if it is empty, or the BadSample."""

    where: str
    content: str | list[dict] | None | BadSample
    starts: bool = True
    ends: bool = True


class Source:
    """The text of a --dataset_id.

    `identity` tells one content from another (None where only the hub knows), `chunks()` yields the same chunks each time.
    """

    def __init__(self, dataset_id: str, text_column: str | None = None):
        self.dataset_id = dataset_id
        self.text_column = text_column
        self.joins_rows = dataset_id in BOOKCORPUS
        self.files = None if _is_hub_id(dataset_id) else find_files(dataset_id)
        self.rows = None
        self.identity = None if self.files is None else _identity(self.files)

    def open(self) -> None:
        """Download what has to be; raises AssetError."""
        if self.files is None:
            self.rows = _load_from_hub(self.dataset_id)

    @functools.cached_property
    def size(self) -> int:
        """Bytes, in the unit of Chunk.progress; counted once, as that takes a while for a table of many batches."""
        return (
            self.rows.data.nbytes if self.files is None else sum(path.stat().st_size for path in self.files)
        )

    def chunks(self, scratch: Path, join_tokens: int = 0) -> Iterator[Chunk]:
        """All documents in order; `scratch` is a folder to unpack files in, `join_tokens` the least length of joined rows."""
        least = max(
            16 * join_tokens, min(CHUNK_BYTES, max(CHUNK_BYTES // 8, self.size // 64))
        )  # a small source is shared out too
        full, pieces, progress, held = None, [], 0, 0
        for piece, read in self._pieces(scratch):
            pieces.append(piece)
            progress += read
            held += getattr(piece.content, "nbytes", 0) or (
                len(piece.content) if isinstance(piece.content, bytes) else 0
            )
            if held >= least:
                if full:
                    yield full
                full, pieces, progress, held = Chunk(pieces, progress), [], 0, 0
        # the rest goes with the last one: rows too few to be joined to a whole document
        yield Chunk(full.pieces + pieces, full.progress + progress) if full else Chunk(pieces, progress)

    def _pieces(self, scratch) -> Iterator[tuple[Piece, int]]:
        """(piece, bytes of the source it stands for), in order."""
        if self.files is None:
            columns = _text_columns(self.rows.column_names, self.text_column)
            if isinstance(columns, BadSample):
                yield Piece(self.dataset_id, 0, columns), self.size
                return
            rows = self.rows.with_format("arrow").select_columns(columns)
            step = max(1, READ_BYTES * len(rows) // max(1, self.size))
            for start in range(0, len(rows), step):
                table = rows[start : start + step]
                yield Piece(self.dataset_id, start + 1, table), self.size * len(table) // len(rows)
            return
        for path in self.files:
            kind = _kind(path)
            try:
                if kind == ".parquet":
                    yield from _parquet_pieces(path, scratch, self.text_column)
                else:
                    yield from (_text_pieces if kind == ".txt" else _line_pieces)(path)
            except (OSError, pa.ArrowException) as error:
                yield Piece(str(path), 0, BadSample(f"cannot be read: {error}")), 0


def find_files(dataset_id: str) -> list[Path]:
    """Files of 'sotu', a file, a folder or a glob (several: with commas between), sorted. Raises AssetError if there are none."""
    if dataset_id == "sotu":
        return sorted(sotu_folder().glob("*.txt"))
    found, ignored = {}, 0
    for name in (
        [dataset_id] if dataset_id and Path(dataset_id).exists() else map(str.strip, dataset_id.split(","))
    ):
        if not name:
            raise AssetError(
                f"--dataset_id={dataset_id!r} has an empty name: give a file, a folder, a glob, or several with commas between"
            )
        path = Path(name).expanduser()
        candidates = (
            [path]
            if path.is_file()
            else path.rglob("*")
            if path.is_dir()
            else map(Path, glob.glob(str(path), recursive=True))
        )
        files = [p for p in candidates if p.is_file() and not p.name.startswith(".")]
        usable = [p for p in files if _kind(p)]
        ignored += len(files) - len(usable)
        if not usable:
            what = f"has no {', '.join(KINDS)} file (also .gz, .zst)" + (
                f" but {files[0].name}" if files else ""
            )
            if not files and not path.is_dir():
                what = "is not a regular, visible file" if os.path.lexists(path) else "does not exist"
            raise AssetError(f"--dataset_id={name} {what}: name such a file, a folder or a glob of them")
        found |= {
            p.resolve(): p for p in sorted(usable, reverse=True)
        }  # each file once, whatever links lead to it
    if ignored:
        print(f"{dataset_id}: ignoring {ignored} files that are not {', '.join(KINDS)}")
    return sorted(found.values())


def _is_hub_id(dataset_id: str) -> bool:
    looks_local = (
        Path(dataset_id).expanduser().exists()
        or _kind(Path(dataset_id))
        or re.search(r"[*?\[,]|^[./~]", dataset_id)
    )
    return (
        dataset_id != "sotu"
        and not looks_local
        and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", dataset_id) is not None
    )


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in CODECS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def _identity(files: list[Path]) -> str:
    """Hash of names and contents; of a file above 4 MB only the size and time of change, as reading it twice would cost too much."""
    digest = xxhash.xxh3_128()
    for path in files:
        stat = path.stat()
        readable = os.access(path, os.R_OK)  # else it is a bad sample, said later
        facts = (
            path.read_bytes()
            if readable and stat.st_size <= 4 << 20
            else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        )
        digest.update(os.fsencode(path.name) + b"\0" + facts + b"\0")
    return digest.hexdigest()


def _load_from_hub(dataset_id: str):
    """The train split of a hub data set (owner/name, or owner/name:configuration), memory-mapped."""
    import datasets
    from huggingface_hub import HfApi

    name, _, configuration = dataset_id.partition(":")

    def load():
        if name not in BOOKCORPUS:
            try:
                return datasets.load_dataset(name, configuration or None, split="train")
            except (RuntimeError, ValueError, FileNotFoundError) as error:
                if not re.search("script|trust_remote_code|data files", str(error)):
                    raise
        # a script is not run: the hub has its result, a folder of parquet files for each configuration
        files = HfApi().list_repo_files(name, repo_type="dataset", revision=CONVERTED)
        found = sorted({file.split("/")[0] for file in files if file.endswith(".parquet")})
        chosen = configuration or (found[0] if len(found) == 1 else None)
        if chosen not in found:
            raise ValueError(f"choose one of its configurations: {', '.join(found) or 'it has none'}")
        return datasets.load_dataset(name, data_dir=chosen, split="train", revision=CONVERTED)

    try:
        return from_hub(load, name, "dataset")
    except AssetError:
        raise
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        raise AssetError(
            f"dataset {name}: {error} (write a configuration as --dataset_id={name}:CONFIGURATION)"
        ) from error


# ---- files in pieces ----


def _read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """(decompressed block, bytes of the file read for it) of a plain or compressed file, without a UTF-8 byte order mark."""
    codec = CODECS.get(path.suffix.lower())
    with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, codec) if codec else raw as stream:
        before, first = 0, True
        while block := stream.read(READ_BYTES):
            progress, before = raw.tell() - before, raw.tell()
            yield (block.removeprefix(b"\xef\xbb\xbf") if first else block), progress
            first = False


def _text_pieces(path: Path):
    buffer, line, starts, progress = b"", 1, True, 0
    try:
        for block, read in _read_blocks(path):
            buffer += block
            progress += read
            if len(buffer) > PIECE_BYTES:
                cut = _cut(buffer, PIECE_BYTES)
                piece, buffer = buffer[:cut], buffer[cut:]
                yield Piece(str(path), line, piece, starts, False), progress
                line, starts, progress = line + piece.count(b"\n"), False, 0
    except OSError:
        if not starts:  # end what was begun, or the next document would continue it
            yield Piece(str(path), line, b"", False, True), 0
        raise
    yield Piece(str(path), line, buffer, starts, True), progress


def _line_pieces(path: Path):
    held, line, progress, too_long = [], 1, 0, False
    for block, read in _read_blocks(path):
        progress += read
        if too_long:  # drop up to the end of the line
            _, newline, block = block.partition(b"\n")
            too_long, line = not newline, line + len(newline)
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            data = b"".join([*held, head, newline])
            yield Piece(str(path), line, data), progress
            held, line, progress = [], line + data.count(b"\n"), 0
        if not too_long:
            held.append(tail)
        if len(held) * READ_BYTES > MAX_LINE_BYTES:
            yield (
                Piece(str(path), line, BadSample(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")),
                progress,
            )
            held, progress, too_long = [], 0, True
    if any(held) or progress:
        yield Piece(str(path), line, b"".join(held)), progress


def _parquet_pieces(path: Path, scratch: Path, text_column):
    size, plain = path.stat().st_size, path
    if codec := CODECS.get(path.suffix.lower()):  # parquet is read from its end: unpack it first
        scratch.mkdir(parents=True, exist_ok=True)
        plain = scratch / xxhash.xxh64_hexdigest(
            os.fsencode(path)
        )  # no suffix: it may lie in a folder of sources
        with (
            pa.OSFile(str(path)) as raw,
            pa.CompressedInputStream(raw, codec) as stream,
            open(plain, "wb") as target,
        ):
            shutil.copyfileobj(stream, target)
    with pq.ParquetFile(plain, buffer_size=READ_BYTES) as opened:
        metadata, row = opened.metadata, 1
        columns = _text_columns(opened.schema_arrow.names, text_column)
        if isinstance(columns, BadSample):
            yield Piece(str(path), 0, columns), size
            return
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            step = min(10_000, max(1, READ_BYTES * group.num_rows // max(1, group.total_byte_size)))
            for batch in opened.iter_batches(step, row_groups=[index], columns=columns, use_threads=False):
                yield (
                    Piece(str(path), row, pa.Table.from_batches([batch])),
                    size * batch.num_rows // metadata.num_rows,
                )
                row += batch.num_rows


def _text_columns(names: list[str], text_column: str | None) -> list[str] | BadSample:
    """Those of a table's columns that are read."""
    wanted = [text_column] if text_column else ["messages", "prompt", "completion", "text"]
    return [name for name in names if name in wanted] or _no_column(wanted[-1], names)


def _no_column(wanted: str, names: Iterable[str]) -> BadSample:
    return BadSample(
        f"no column {wanted!r} but {', '.join(map(repr, names)) or 'none'}: name the text's with --text_column"
    )


def _cut(data: bytes, limit: int) -> int:
    """Where to cut `data` before `limit` so that no tokenizer's word is split, else between two characters."""
    while limit > 1 and data[limit] & 0xC0 == 0x80:  # not inside a UTF-8 character
        limit -= 1
    low = max(0, limit - (8 << 10))
    window = data[low:limit].decode(errors="surrogateescape")
    places = [match.start() for match in SAFE_CUT.finditer(window)]
    if places:
        return low + len(window[: places[-1]].encode(errors="surrogateescape"))
    return limit


def split_long(text: str) -> list[str]:
    """A text in pieces of at most about PIECE_BYTES whose tokens, one after the other, are the text's."""
    if len(text) <= PIECE_BYTES // 4 or len(data := text.encode()) <= PIECE_BYTES:
        return [text]
    pieces = []
    while len(data) > PIECE_BYTES:
        cut = _cut(data, PIECE_BYTES)
        pieces.append(data[:cut].decode())
        data = data[cut:]
    return pieces + [data.decode()]


# ---- documents of a chunk ----


def documents(chunk: Chunk, text_column: str | None) -> Iterator[Document]:
    """Documents of a chunk, bad and empty ones among them."""
    for name, first, content, starts, ends in chunk.pieces:
        if isinstance(content, BadSample):
            yield Document(f"{name}:{first}" if first else name, content)
        elif starts is not None:
            yield from _text_document(name, first, content, starts, ends)
        elif isinstance(content, bytes):
            for number, line in enumerate(content.split(b"\n"), first):
                if line.strip():
                    yield Document(f"{name}:{number}", _usable(line, text_column))
        else:
            for number, record in enumerate(_records(content), first):
                yield Document(f"{name} row {number}", _usable(record, text_column))


def _text_document(name: str, line: int, data: bytes, starts: bool, ends: bool) -> Iterator[Document]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line_of_error = line + data.count(b"\n", 0, error.start)
        yield Document(f"{name}:{line_of_error}", BadSample(_not_utf8(error)))
        if starts and ends:
            return
        text = ""  # the rest of the document keeps its beginning and end
    yield Document(f"{name}:{line}", None if starts and ends and not text.strip() else text, starts, ends)


def _records(table: pa.Table) -> list[dict | UnicodeDecodeError]:
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:  # in one of them
        return (
            [error]
            if len(table) == 1
            else [record for row in range(len(table)) for record in _records(table.slice(row, 1))]
        )


def _usable(
    record: bytes | dict | UnicodeDecodeError, text_column: str | None
) -> str | list[dict] | None | BadSample:
    """Text or messages of a line or row, None if it is empty, or what is wrong with it."""
    try:
        if isinstance(record, UnicodeDecodeError):
            raise record
        if isinstance(record, bytes):
            record = json.loads(record.decode())
        return _content(record, text_column)
    except BadSample as error:
        return error
    except UnicodeDecodeError as error:
        return BadSample(_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return BadSample(f"not JSON: {error}")


def _content(record, text_column: str | None) -> str | list[dict] | None:
    if not isinstance(record, dict):
        raise BadSample(f"a JSON {type(record).__name__}, where an object is needed")
    if text_column is None and "messages" in record:
        return _checked_messages(record["messages"])
    if text_column is None and "prompt" in record and "completion" in record:
        pair = (("user", record["prompt"]), ("assistant", record["completion"]))
        return _checked_messages([dict(role=role, content=content) for role, content in pair])
    column = text_column or "text"
    if column not in record:
        raise _no_column(column, record)
    text = record[column]
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    return _checked_text(text, f"column {column!r}")


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
            raise BadSample(
                f"turn {number} has weight {message['weight']}, which is not supported: every assistant turn is learned alike"
            )
        _checked_text(message.get("content"), f"the content of turn {number}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise BadSample(
            "no assistant turn to learn" if "assistant" not in roles else "it begins with an assistant turn"
        )
    return [dict(role=message["role"], content=message["content"]) for message in messages]


def _checked_text(text, what: str) -> str:
    if not isinstance(text, str):
        raise BadSample(f"{what} is {'null' if text is None else type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(f"{what} has an unpaired surrogate at character {error.start}") from error
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}); save it as UTF-8"
