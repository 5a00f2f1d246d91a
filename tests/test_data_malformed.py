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


def jsonl(*lines: bytes):
    """A good file with these lines in it, from line 4 on."""
    texts = [json.dumps({"text": text}).encode() for text in GOOD]
    return lambda folder: (folder / "a.jsonl").write_bytes(
        b"\n".join([*texts[:3], *lines, *texts[3:]]) + b"\n"
    )


def parquet(column, name="text"):
    return lambda folder: pq.write_table(pa.table({name: column}), folder / "a.parquet")


def text(data: bytes):
    def write(folder):
        write_jsonl(folder / "good.jsonl", GOOD)
        (folder / "a.txt").write_bytes(data)

    return write


def binary_strings(folder):
    """A parquet file whose strings are not UTF-8."""
    values = [text.encode() for text in GOOD[:5]] + [b"bad \xff byte"] + [text.encode() for text in GOOD[5:]]
    column = pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), folder / "a.parquet")


def torn_parquet(folder):
    write_jsonl(folder / "good.jsonl", GOOD)
    pq.write_table(pa.table({"text": GOOD}), folder / "a.parquet")
    (folder / "a.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-100])


def broken_pages(folder):
    """A parquet file whose end is whole and whose pages are not."""
    pq.write_table(pa.table({"text": GOOD}), folder / "a.parquet", compression="zstd")
    data = bytearray((folder / "a.parquet").read_bytes())
    data[40:140] = bytes(100)
    (folder / "a.parquet").write_bytes(data)
    write_jsonl(folder / "good.jsonl", GOOD)


def torn_gzip(folder):
    lines = "".join(json.dumps({"text": text * 20}) + "\n" for text in make_texts(300, seed=3))
    packed = gzip.compress(lines.encode())
    (folder / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    write_jsonl(folder / "good.jsonl", GOOD)


def not_gzip(folder):
    (folder / "a.txt.gz").write_bytes(b"this is not packed")
    write_jsonl(folder / "good.jsonl", GOOD)


# name: (how to write it, what the complaint must contain)
BAD = {
    "invalid JSON": (jsonl(b'{"text": '), "a.jsonl:4: not JSON"),
    "two records on a line": (jsonl(b'{"text": "a"}{"text": "b"}'), "a.jsonl:4: not JSON"),
    "a list for a record": (jsonl(b'["text"]'), "a.jsonl:4: a JSON list"),
    "a number for a record": (jsonl(b"7"), "a.jsonl:4: a JSON int"),
    "nesting without end": (jsonl(b"[" * 100_000), "a.jsonl:4: not JSON"),
    "no such column": (jsonl(b'{"body": "x", "title": "y"}'), "a.jsonl:4: no column 'text' but 'body', 'title'"),
    "a number for the text": (jsonl(b'{"text": 7}'), "a.jsonl:4: column 'text' is int, not text"),
    "a list for the text": (jsonl(b'{"text": ["a"]}'), "a.jsonl:4: column 'text' is list, not text"),
    "an unpaired surrogate": (jsonl(b'{"text": "a\\ud800"}'), "a.jsonl:4: column 'text' has an unpaired surrogate"),
    "a line that is not UTF-8": (jsonl(b'{"text": "caf\xe9"}'), "a.jsonl:4: not UTF-8: byte 0xe9"),
    "a prompt without text": (jsonl(b'{"prompt": null, "completion": "x"}'), "a.jsonl:4: the content of turn 1 is null"),
    "a file that is not UTF-8": (text(b"first\nsecond\ncaf\xe9"), "a.txt:3: not UTF-8: byte 0xe9"),
    "a file in UTF-16": (text("text".encode("utf-16")), "a.txt:1: not UTF-8: byte 0xff"),
    "a parquet file without its end": (torn_parquet, "a.parquet: cannot be read"),
    "a parquet file with broken pages": (broken_pages, "a.parquet: cannot be read"),
    "a parquet file of something else": (lambda folder: (write_jsonl(folder / "good.jsonl", GOOD),
                                         (folder / "a.parquet").write_text("PAR0")), "a.parquet: cannot be read"),
    "an empty parquet file": (lambda folder: (write_jsonl(folder / "good.jsonl", GOOD), (folder / "a.parquet").touch()),
                              "a.parquet: cannot be read"),
    "strings in parquet that are not UTF-8": (binary_strings, "a.parquet row 6: not UTF-8: byte 0xff"),
    "numbers in a parquet column": (lambda folder: (write_jsonl(folder / "good.jsonl", GOOD), parquet([7])(folder)),
                                    "a.parquet row 1: column 'text' is int, not text"),
    "a parquet file without text": (lambda folder: (write_jsonl(folder / "good.jsonl", GOOD), pq.write_table(
        pa.table({"when": pa.array([2**60], pa.timestamp("us")), "body": ["x"]}), folder / "a.parquet")),
                                    "a.parquet: no column 'text' but 'when', 'body'"),
    "a gzip file cut short": (torn_gzip, "a.jsonl.gz: cannot be read"),
    "a gzip file that is none": (not_gzip, "a.txt.gz: cannot be read"),
}  # fmt: skip


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
    "an empty .txt": (text(b""), 1),
    "a .txt of blanks": (text(b" \n\n\t"), 1),
    "an empty .jsonl": (lambda folder: (write_jsonl(folder / "good.jsonl", GOOD), (folder / "a.jsonl").touch()), 0),
    "a byte order mark": (lambda folder: (folder / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"".join(json.dumps({"text": text}).encode() + b"\n" for text in GOOD)), 0),
    "lines that end in CR LF": (lambda folder: (folder / "a.jsonl").write_bytes(
        b"".join(json.dumps({"text": text}).encode() + b"\r\n" for text in GOOD)), 0),
    "no newline at the end": (lambda folder: (folder / "a.jsonl").write_bytes(
        b"\n".join(json.dumps({"text": text}).encode() for text in GOOD)), 0),
    "a parquet file without rows": (lambda folder: (write_jsonl(folder / "good.jsonl", GOOD),
                                                    parquet(pa.array([], pa.string()))(folder)), 0),
    "large strings and dictionaries": (parquet(pa.array(GOOD, pa.large_string()).dictionary_encode()), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_empty_is_skipped_and_counted(tmp_path, name):
    write, empty = SKIPPED[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    prepare(str(tmp_path / "in"), small_tokenizer(), tmp_path / "p", 64)
    known = facts(tmp_path / "p")
    counts = (known["empty_samples"], known["bad_samples"], sum(known["documents"].values()))
    assert counts == (empty, 0, len(GOOD))


# name: (how to write it, --dataset_id below the folder, what the complaint must contain)
USELESS = {
    "no such file": (lambda folder: None, "in/none.jsonl", "none.jsonl does not exist"),
    "no such folder": (lambda folder: None, "nowhere/", "does not exist"),
    "a glob of nothing": (lambda folder: None, "in/*.txt", "in/*.txt does not exist"),
    "an empty folder": (lambda folder: None, "in", "has no .txt, .jsonl, .parquet file"),
    "a folder of other files": (lambda folder: (folder / "a.csv").write_text("x"), "in", "but a.csv"),
    "a file of another kind": (lambda folder: (folder / "a.csv").write_text("x"), "in/a.csv", "but a.csv"),
    "nothing but empty files": (lambda folder: (folder / "a.jsonl").touch(), "in", "0 documents with 0 tokens"),
    "nothing but empty texts": (lambda folder: write_jsonl(folder / "a.jsonl", ["", " "]), "in", "0 documents"),
    "less than one sample": (lambda folder: write_jsonl(folder / "a.jsonl", ["a b c"]), "in",
                             "fewer than one sample of --max_seq_len=64"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_nothing_to_prepare_is_a_sentence(tmp_path, name):
    write, dataset_id, said = USELESS[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    with pytest.raises(ValueError) as refused:
        prepare(f"{tmp_path}/{dataset_id}", small_tokenizer(), tmp_path / "p", 64)
    assert said in str(refused.value) and not (tmp_path / "p").exists()


def test_the_first_few_of_many_bad_samples_are_named_and_all_are_counted(tmp_path):
    lines = [json.dumps({"text": text}) if number % 3 else "{" for number, text in enumerate(make_texts(90))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError) as refused:
        prepare(str(tmp_path / "a.jsonl"), small_tokenizer(), tmp_path / "p", 64)
    assert "30 bad samples" in str(refused.value)
    named = [line for line in range(1, 91) if f"a.jsonl:{line}:" in str(refused.value)]
    assert named == [1, 4, 7, 10, 13]


def test_line_numbers_hold_across_blocks_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2000)
    lines = [json.dumps({"text": text}) for text in make_texts(200)]
    lines[177] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="a.jsonl:178: not JSON"):
        prepare(str(tmp_path / "a.jsonl"), small_tokenizer(), tmp_path / "p", 64)


def test_a_text_too_long_is_named_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_CHARACTERS", 5000)
    records = [*GOOD[:5], "x" * 9000, *GOOD[5:], "y" * 6000]
    with pytest.raises(ValueError, match="2 bad samples") as refused:
        prepare_records(tmp_path, small_tokenizer(), records)
    for line in (6, 32):
        assert f"a.jsonl:{line}: column 'text' is longer than 5,000 characters: split" in str(refused.value)
    prepare_records(tmp_path, small_tokenizer(), records, skip_bad_samples=True)
    assert sum(facts(tmp_path / "p")["documents"].values()) == len(GOOD)


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_a_document_like_another(tmp_path):
    prepare_records(tmp_path, small_tokenizer(), [*GOOD[:5], " ".join(make_texts(1000)) * 300, *GOOD[5:]])
    assert (tmp_path / "a.jsonl").stat().st_size > 100e6
    assert sum(facts(tmp_path / "p")["documents"].values()) == len(GOOD) + 1
