"""Whatever is wrong with the input is a sentence that names the place, or a skip that is counted."""

import gzip
import json

import pyarrow as pa
import pytest
from helpers.corpora import facts, make_texts, prepare_records, table_bytes, write_jsonl
from helpers.runs import small_tokenizer

from dataset import shards, sources
from dataset.encode import Encoder
from dataset.prepare import prepare
from errors import UserError

GOOD = make_texts(30)
USER, REPLY = dict(role="user", content="a"), dict(role="assistant", content="b")
LINES = [json.dumps({"text": text}).encode() for text in GOOD]


def jsonl(*lines: bytes, end=b"\n", start=b""):
    """A good file with these lines in it, from line 4 on."""
    data = start + end.join([*LINES[:3], *lines, *LINES[3:]]) + end
    return lambda folder: (folder / "a.jsonl").write_bytes(data)


def turns(*messages) -> bytes:
    return json.dumps({"messages": messages}).encode()


def file(name: str, data: bytes):
    """A file of these bytes beside a good one."""

    def write(folder):
        write_jsonl(folder / "good.jsonl", GOOD)
        (folder / name).write_bytes(data)

    return write


def parquet(column, **options):
    return lambda folder: (folder / "a.parquet").write_bytes(table_bytes(column, **options))


VALUES = [*map(str.encode, GOOD[:5]), b"bad \xff byte", *map(str.encode, GOOD[5:])]
NOT_UTF8 = pa.Array.from_buffers(pa.string(), len(VALUES), pa.array(VALUES, pa.binary()).buffers())
BROKEN_PAGES = bytearray(table_bytes(GOOD, compression="zstd"))  # whole at its end
BROKEN_PAGES[40:140] = bytes(100)
BIG_GZIP = gzip.compress(b"".join(line + b"\n" for line in LINES * 200))
YEAR_OUT_OF_RANGE = pa.array([2**60], pa.timestamp("us"))

BAD_LINES = [  # (line of a .jsonl, what the complaint about it must begin with)
    (b'{"text": ', "not JSON"),
    (b'{"text": "a"}{"text": "b"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["text"]', "a JSON list"),
    (b"7", "a JSON int"),
    (b'{"a": "x", "b": "y"}', "no column 'text' but 'a', 'b'"),
    (b'{"text": 7}', "column 'text' is int, not text"),
    (b'{"text": ["a"]}', "column 'text' is list, not text"),
    (b'{"text": "a\\ud800"}', "column 'text' has an unpaired surrogate"),
    (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9"),
    (b'{"prompt": null, "completion": "x"}', "the content of turn 1 is null"),
    (turns(), "'messages' is not a list of turns, or empty"),
    (b'{"messages": "hello"}', "'messages' is not a list of turns"),
    (turns("hello"), "turn 1 has role 'hello'"),
    (turns({"content": "x"}), "turn 1 has role 'None'"),
    (turns(USER | {"role": "user<|im_end|>"}), "turn 1 has role"),
    (turns(USER, REPLY | {"content": None}), "the content of turn 2 is null"),
    (turns(USER, REPLY | {"content": []}), "the content of turn 2 is list"),
    (turns(USER, REPLY | {"content": "\ud800"}), "the content of turn 2 has an unpaired surrogate"),
    (turns(USER, REPLY | {"tool_calls": [{"name": "f"}]}), "turn 2 has tool_calls"),
    (turns(USER, REPLY | {"weight": 0}), "turn 2 has a weight"),
    (turns(USER), "no assistant turn to learn"),
    (b'{"conversations": [{"from": "narrator", "value": "x"}]}', "turn 1 has role 'narrator'"),
    (b'{"conversations": [{"from": "human"}]}', "the content of turn 1 is null"),
    (b'{"conversations": {}}', "'conversations' is not a list of turns"),
    (b'{"instruction": "x", "input": ["y"], "output": "z"}', "'instruction' or 'input' is list"),
    (turns(REPLY, USER), "it begins with an assistant turn"),
]
BAD_FILES = [  # (name, content, what the complaint must begin with)
    ("a.txt", b"first\nsecond\ncaf\xe9", "a.txt:3: not UTF-8: byte 0xe9"),
    ("a.txt", "text".encode("utf-16"), "a.txt:1: not UTF-8: byte 0xff"),
    ("a.parquet", table_bytes(GOOD)[:-100], "a.parquet: cannot be read"),
    ("a.parquet", bytes(BROKEN_PAGES), "a.parquet: cannot be read"),
    ("a.parquet", b"PAR0", "a.parquet: cannot be read"),
    ("a.parquet", b"", "a.parquet: cannot be read"),
    ("a.parquet", table_bytes(NOT_UTF8), "a.parquet row 6: not UTF-8: byte 0xff"),
    ("a.parquet", table_bytes([7]), "a.parquet row 1: column 'text' is int, not text"),
    ("a.parquet", table_bytes(YEAR_OUT_OF_RANGE, "when"), "a.parquet: no column 'text' but 'when'"),
    ("a.jsonl.gz", BIG_GZIP[: len(BIG_GZIP) // 2], "a.jsonl.gz: cannot be read"),
    ("a.txt.gz", b"this is not packed", "a.txt.gz: cannot be read"),
]
BAD = [(jsonl(line), f"a.jsonl:4: {said}") for line, said in BAD_LINES]
BAD += [(file(name, content), said) for name, content, said in BAD_FILES]


def encoded(folder, encoder: Encoder) -> tuple[list[int], list[str]]:
    """Return the lengths in tokens of the documents in a folder, and the problems of the others."""
    documents = sources.read_documents(str(folder), sources.find_files(str(folder)), None)
    _, _, lengths, problems = encoder.encode(documents)
    return lengths.tolist(), problems


@pytest.fixture(scope="module")
def encoder():
    return Encoder(small_tokenizer())


@pytest.mark.parametrize("write, said", BAD, ids=[said for _, said in BAD])
def test_a_bad_sample_is_named_and_the_others_are_read(tmp_path, encoder, write, said):
    write(tmp_path)
    lengths, problems = encoded(tmp_path, encoder)
    assert len(problems) == 1 and problems[0].startswith(f"{tmp_path}/{said}")
    assert sum(length > 0 for length in lengths) >= len(GOOD)


# The first line of each kind of reader that is bad.
WHOLE = [BAD[0], *(bad for bad in BAD if bad[1].startswith(("a.parquet row 6", "a.jsonl.gz")))]


@pytest.mark.parametrize("write, said", WHOLE, ids=[said for _, said in WHOLE])
def test_a_preparation_refuses_a_bad_sample_or_counts_it_and_leaves_it_out(tmp_path, write, said):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    with pytest.raises(UserError) as refused:
        prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64)
    assert f"{tmp_path}/in/{said}" in str(refused.value) and "--skip_bad_samples" in str(refused.value)
    assert "has bad samples (1):" in str(refused.value) and not (tmp_path / "p").exists()
    assert f"{tmp_path}/p.preparing keeps what is tokenized" in str(refused.value)
    prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64, skip_bad_samples=True)
    preparation = facts(tmp_path / "p")
    assert preparation["bad_samples"] == 1 and sum(preparation["documents"].values()) >= len(GOOD)


# name: (how to write it, empty samples that are counted)
SKIPPED = {
    "blank lines": (jsonl(b"", b"  ", b"\r"), 0),
    "empty texts": (jsonl(b'{"text": ""}', b'{"text": " \\n"}'), 2),
    "null texts": (jsonl(b'{"text": null}'), 1),
    "nulls in a parquet column": (parquet([None, *GOOD, None]), 2),
    "an empty .txt": (file("a.txt", b""), 1),
    "a .txt of blanks": (file("a.txt", b" \n\n\t"), 1),
    "an empty .jsonl": (file("a.jsonl", b""), 0),
    "a byte order mark": (jsonl(start=b"\xef\xbb\xbf"), 0),
    "lines that end in CR LF": (jsonl(end=b"\r\n"), 0),
    "no newline at the end": (lambda folder: (folder / "a.jsonl").write_bytes(b"\n".join(LINES)), 0),
    "a parquet file without rows": (file("a.parquet", table_bytes(pa.array([], pa.string()))), 0),
    "large strings and dictionaries": (parquet(pa.array(GOOD, pa.large_string()).dictionary_encode()), 0),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_empty_is_skipped(tmp_path, encoder, name):
    write, empty = SKIPPED[name]
    write(tmp_path)
    lengths, problems = encoded(tmp_path, encoder)
    assert (lengths.count(0), len(lengths) - lengths.count(0), problems) == (empty, len(GOOD), [])


def test_empty_samples_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    jsonl(b'{"text": ""}', b'{"text": " \\n"}')(tmp_path / "in")
    preparation = facts(prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64))
    assert (preparation["empty_samples"], preparation["bad_samples"]) == (2, 0)
    assert sum(preparation["documents"].values()) == len(GOOD)


# name: (a file and its text, --dataset_id, what the complaint must contain)
USELESS = {
    "no such folder": (None, "nowhere/", "does not exist"),
    "a glob of nothing": (None, "in/*.txt", "in/*.txt does not exist"),
    "an empty folder": (None, "in", "has no .txt, .jsonl, .parquet file"),
    "a file of another kind": (("a.csv", "x"), "in/a.csv", "has no .txt"),
    "nothing but empty files": (("a.jsonl", ""), "in", "0 documents with 0 tokens"),
    "nothing but empty texts": (("a.jsonl", '{"text": ""}\n{"text": " "}'), "in", "0 documents"),
    "a column of a .txt": (("a.txt", "a b c"), "in", "--text_column=body has no meaning for .txt"),
}


@pytest.mark.parametrize("name", USELESS)
def test_nothing_to_prepare_is_a_sentence(tmp_path, name):
    content, dataset_id, said = USELESS[name]
    (tmp_path / "in").mkdir()
    if content:
        (tmp_path / "in" / content[0]).write_text(content[1])
    with pytest.raises(UserError) as refused:
        column = "body" if "text_column" in said else None
        prepare(f"{tmp_path}/{dataset_id}", small_tokenizer(), tmp_path / "p", 64, text_column=column)
    assert said in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_first_few_of_many_bad_samples_are_named_by_line_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)  # so that they lie in many shards
    lines = [b"{" if number % 3 == 0 else line for number, line in enumerate(LINES * 6, 1)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"has bad samples \(60\)") as refused:
        prepare(str(tmp_path / "a.jsonl"), small_tokenizer(), tmp_path / "p", 64)
    named = [line for line in range(1, 181) if f"a.jsonl:{line}:" in str(refused.value)]
    assert named == [3, 6, 9, 12, 15]


def test_a_text_too_long_is_named_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_CHARACTERS", 5000)
    records = [*GOOD[:5], "x" * 9000, *GOOD[5:]]
    with pytest.raises(UserError, match="a.jsonl:6: column 'text' has more than 5,000 characters: split"):
        prepare_records(tmp_path, small_tokenizer(), records)
    prepare_records(tmp_path, small_tokenizer(), records, skip_bad_samples=True)
    assert sum(facts(tmp_path / "p")["documents"].values()) == len(GOOD)
