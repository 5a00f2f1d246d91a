"""Whatever is wrong with the input is a sentence that names the place, or a skip that is counted."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import facts, make_texts, prepare_records, small_tokenizer, write_jsonl

from llama3 import shards, sources
from llama3.data import prepare

GOOD = make_texts(30)
USER, REPLY = dict(role="user", content="a"), dict(role="assistant", content="b")
LINES = [json.dumps({"text": text}).encode() for text in GOOD]


def jsonl(*lines: bytes, end=b"\n", start=b""):
    """A good file with these lines in it, from line 4 on."""
    data = start + end.join([*LINES[:3], *lines, *LINES[3:]]) + end
    return lambda folder: (folder / "a.jsonl").write_bytes(data)


def turns(*messages):
    return jsonl(json.dumps({"messages": messages}).encode())


def file(name: str, data: bytes):
    """A file of these bytes beside a good one."""

    def write(folder):
        write_jsonl(folder / "good.jsonl", GOOD)
        (folder / name).write_bytes(data)

    return write


def table_bytes(column, name: str = "text", **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), sink, **options)
    return sink.getvalue().to_pybytes()


def parquet(column, **options):
    return lambda folder: (folder / "a.parquet").write_bytes(table_bytes(column, **options))


VALUES = [*map(str.encode, GOOD[:5]), b"bad \xff byte", *map(str.encode, GOOD[5:])]
NOT_UTF8 = pa.Array.from_buffers(pa.string(), len(VALUES), pa.array(VALUES, pa.binary()).buffers())
BROKEN_PAGES = bytearray(table_bytes(GOOD, compression="zstd"))  # whole at its end
BROKEN_PAGES[40:140] = bytes(100)
BIG_GZIP = gzip.compress(b"".join(line + b"\n" for line in LINES * 200))
YEAR_OUT_OF_RANGE = pa.array([2**60], pa.timestamp("us"))

# name: (how to write it, what the complaint must contain)
BAD = {
    "invalid JSON": (jsonl(b'{"text": '), "a.jsonl:4: not JSON"),
    "two records on a line": (jsonl(b'{"text": "a"}{"text": "b"}'), "a.jsonl:4: not JSON"),
    "a list for a record": (jsonl(b'["text"]'), "a.jsonl:4: a JSON list"),
    "a number for a record": (jsonl(b"7"), "a.jsonl:4: a JSON int"),
    "nesting without end": (jsonl(b"[" * 100_000), "a.jsonl:4: not JSON"),
    "no such column": (jsonl(b'{"a": "x", "b": "y"}'), "a.jsonl:4: no column 'text' but 'a', 'b'"),
    "a number for the text": (jsonl(b'{"text": 7}'), "a.jsonl:4: column 'text' is int, not text"),
    "a list for the text": (jsonl(b'{"text": ["a"]}'), "a.jsonl:4: column 'text' is list, not text"),
    "a surrogate": (jsonl(b'{"text": "a\\ud800"}'), "a.jsonl:4: column 'text' has an unpaired surrogate"),
    "a line that is not UTF-8": (jsonl(b'{"text": "caf\xe9"}'), "a.jsonl:4: not UTF-8: byte 0xe9"),
    "a null prompt": (
        jsonl(b'{"prompt": null, "completion": "x"}'),
        "a.jsonl:4: the content of turn 1 is null",
    ),
    "a file that is not UTF-8": (file("a.txt", b"first\nsecond\ncaf\xe9"), "a.txt:3: not UTF-8: byte 0xe9"),
    "a file in UTF-16": (file("a.txt", "text".encode("utf-16")), "a.txt:1: not UTF-8: byte 0xff"),
    "parquet without its end": (file("a.parquet", table_bytes(GOOD)[:-100]), "a.parquet: cannot be read"),
    "parquet with broken pages": (file("a.parquet", bytes(BROKEN_PAGES)), "a.parquet: cannot be read"),
    "a parquet file of something else": (file("a.parquet", b"PAR0"), "a.parquet: cannot be read"),
    "an empty parquet file": (file("a.parquet", b""), "a.parquet: cannot be read"),
    "parquet strings that are not UTF-8": (parquet(NOT_UTF8), "a.parquet row 6: not UTF-8: byte 0xff"),
    "numbers in a parquet column": (
        file("a.parquet", table_bytes([7])),
        "a.parquet row 1: column 'text' is int",
    ),
    "a parquet file without text": (
        file("a.parquet", table_bytes(YEAR_OUT_OF_RANGE, "when")),
        "a.parquet: no column 'text' but 'when'",
    ),
    "a gzip file cut short": (
        file("a.jsonl.gz", BIG_GZIP[: len(BIG_GZIP) // 2]),
        "a.jsonl.gz: cannot be read",
    ),
    "a gzip file that is none": (file("a.txt.gz", b"this is not packed"), "a.txt.gz: cannot be read"),
    "no turns": (turns(), "a.jsonl:4: 'messages' is not a list of turns, or empty"),
    "text for turns": (jsonl(b'{"messages": "hello"}'), "a.jsonl:4: 'messages' is not a list of turns"),
    "text for a turn": (turns("hello"), "a.jsonl:4: turn 1 has role 'hello'"),
    "a turn without a role": (turns({"content": "x"}), "a.jsonl:4: turn 1 has role 'None'"),
    "a control token in a role": (turns(USER | {"role": "user<|im_end|>"}), "a.jsonl:4: turn 1 has role"),
    "null for a turn's text": (
        turns(USER, REPLY | {"content": None}),
        "a.jsonl:4: the content of turn 2 is null",
    ),
    "a list for a turn's text": (
        turns(USER, REPLY | {"content": []}),
        "a.jsonl:4: the content of turn 2 is list",
    ),
    "a surrogate in a turn": (
        turns(USER, REPLY | {"content": "\ud800"}),
        "a.jsonl:4: the content of turn 2 has an",
    ),
    "tool calls": (turns(USER, REPLY | {"tool_calls": [{"name": "f"}]}), "a.jsonl:4: turn 2 has tool_calls"),
    "a weight": (turns(USER, REPLY | {"weight": 0}), "a.jsonl:4: turn 2 has a weight"),
    "no assistant turn": (turns(USER), "a.jsonl:4: no assistant turn to learn"),
    "an assistant turn first": (turns(REPLY, USER), "a.jsonl:4: it begins with an assistant turn"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_named_and_refused_or_counted_and_left_out(tmp_path, name):
    write, said = BAD[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    with pytest.raises(ValueError) as refused:
        prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64)
    assert f"{tmp_path}/in/{said}" in str(refused.value) and "--skip_bad_samples" in str(refused.value)
    assert not (tmp_path / "p").exists()
    prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64, skip_bad_samples=True)
    known = facts(tmp_path / "p")
    assert known["bad_samples"] == 1 and sum(known["documents"].values()) >= len(GOOD)


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
def test_what_is_empty_is_skipped_and_counted(tmp_path, name):
    write, empty = SKIPPED[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    known = facts(prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64))
    counts = (known["empty_samples"], known["bad_samples"], sum(known["documents"].values()))
    assert counts == (empty, 0, len(GOOD))


# name: (a file and its text, --dataset_id, what the complaint must contain)
USELESS = {
    "no such file": (None, "in/none.jsonl", "none.jsonl does not exist"),
    "no such folder": (None, "nowhere/", "does not exist"),
    "a glob of nothing": (None, "in/*.txt", "in/*.txt does not exist"),
    "an empty folder": (None, "in", "has no .txt, .jsonl, .parquet file"),
    "a folder of other files": (("a.csv", "x"), "in", "but a.csv"),
    "a file of another kind": (("a.csv", "x"), "in/a.csv", "but a.csv"),
    "nothing but empty files": (("a.jsonl", ""), "in", "0 documents with 0 tokens"),
    "nothing but empty texts": (("a.jsonl", '{"text": ""}\n{"text": " "}'), "in", "0 documents"),
    "less than one sample": (("a.txt", "a b c"), "in", "fewer than one sample of --max_seq_len=64"),
}


@pytest.mark.parametrize("name", USELESS)
def test_nothing_to_prepare_is_a_sentence(tmp_path, name):
    content, dataset_id, said = USELESS[name]
    (tmp_path / "in").mkdir()
    if content:
        (tmp_path / "in" / content[0]).write_text(content[1])
    with pytest.raises(ValueError) as refused:
        prepare(f"{tmp_path}/{dataset_id}", small_tokenizer(), tmp_path / "p", 64)
    assert said in str(refused.value) and not (tmp_path / "p").exists()


def test_the_first_few_of_many_bad_samples_are_named_by_line_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2000)  # so that they lie in many shards
    lines = [b"{" if number % 3 == 0 else line for number, line in enumerate(LINES * 6, 1)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="60 bad samples") as refused:
        prepare(str(tmp_path / "a.jsonl"), small_tokenizer(), tmp_path / "p", 64)
    named = [line for line in range(1, 181) if f"a.jsonl:{line}:" in str(refused.value)]
    assert named == [3, 6, 9, 12, 15]


def test_a_text_too_long_is_named_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_CHARACTERS", 5000)
    records = [*GOOD[:5], "x" * 9000, *GOOD[5:]]
    with pytest.raises(ValueError, match="a.jsonl:6: column 'text' is longer than 5,000 characters: split"):
        prepare_records(tmp_path, small_tokenizer(), records)
    prepare_records(tmp_path, small_tokenizer(), records, skip_bad_samples=True)
    assert sum(facts(tmp_path / "p")["documents"].values()) == len(GOOD)


@pytest.mark.slow
def test_a_line_of_10_megabytes_is_a_document_like_another(tmp_path):
    prepare_records(tmp_path, small_tokenizer(), [*GOOD[:5], " ".join(make_texts(1000)) * 30, *GOOD[5:]])
    assert (tmp_path / "a.jsonl").stat().st_size > 10e6
    assert sum(facts(tmp_path / "p")["documents"].values()) == len(GOOD) + 1
