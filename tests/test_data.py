"""Prepared data: what lies on disk is what was given, whoever prepared it and however often it was killed."""

import gzip
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.utils import tqdm
from helpers import corpora
from helpers.corpora import documents_of, facts, make_texts, prepare_records, real_tokenizer, rows, samples
from helpers.runs import python

from dataset import pack as pack_module
from dataset import prepare as prepare_module
from dataset import shards, sources
from dataset.batches import Collator, bits_per_byte, open_split
from dataset.check import check_prepared, fingerprint, verify
from dataset.encode import Encoder
from dataset.prepare import prepare
from dataset.sources import Document
from errors import UserError
from tokens import document_separator

T = 64
tqdm.set_lock(threading.RLock())  # a process that is forked and killed here must not hold it


@pytest.fixture(scope="module")
def tokenizer():
    return real_tokenizer("small")


@pytest.fixture
def small_shards(monkeypatch):
    """Many shards out of little text."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("prepared")
    return prepare_records(folder, tokenizer, make_texts(300), validation_fraction=0.3)


def expected_documents(tokenizer, texts):
    return [tokenizer(text)["input_ids"] + [0] for text in texts]


def test_every_document_is_there_whole_and_once_but_for_the_last_remainder(tmp_path, tokenizer):
    texts = make_texts(200)
    prepare_records(tmp_path, tokenizer, texts, validation_fraction=0.1)
    known, said = expected_documents(tokenizer, texts), facts(tmp_path / "p")
    assert said["documents"] == {"train": 180, "validation": 20}
    decides = {"format", "source", "tokenizer", "max_seq_len", "validation_fraction", "seed", "text_column"}
    assert set(said["settings"]) == decides and said["max_token_id"] == max(map(max, known))
    for split in ("train", "validation"):
        for row in rows(tmp_path / "p", split):
            ends = [t for t in range(T - 1) if row["input_ids"][t] == 0]
            assert len(row["input_ids"]) == T and row["document_starts"] == [0, *(t + 1 for t in ends)]
        found, ours = documents_of(tmp_path / "p", split), iter(known)
        for document in found[:-1]:
            assert any(document == other for other in ours), "not there, or not in the order of the source"
        assert any(document[: len(found[-1])] == found[-1] for document in known)
        tokens = sum(map(len, found))
        assert tokens == said["tokens"][split] == said["samples"][split] * T
        assert said["dropped_tokens"][split] < T
    total = sum(said["tokens"].values()) + sum(said["dropped_tokens"].values())
    assert total == sum(map(len, known)) and sum(said["documents_by_length"].values()) == len(known)


def test_the_same_texts_give_the_same_samples_from_every_kind_of_file_and_a_mix(tmp_path, tokenizer):
    texts, kinds = make_texts(40), tmp_path / "kinds"
    (kinds / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (kinds / "texts" / f"{number:03}.txt").write_text(text)
    lines = corpora.write_jsonl(kinds / "a.jsonl", texts).read_bytes()
    (kinds / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.CompressedOutputStream(str(kinds / "c.jsonl.zst"), "zstd") as file:
        file.write(lines)
    (kinds / "c2.JSONL.GZ").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"id": range(40), "text": texts}), kinds / "d.parquet", row_group_size=7)
    (kinds / "e.parquet.gz").write_bytes(gzip.compress((kinds / "d.parquet").read_bytes()))
    named = {source.name: str(source) for source in kinds.iterdir()}
    corpora.write_jsonl(kinds / "mix-a.jsonl", texts[:10])
    pq.write_table(pa.table({"text": texts[10:20]}), kinds / "mix-b.parquet")
    named["mix"] = f"{kinds}/mix*.jsonl,{kinds}/mix-b.parquet,{kinds}/texts/0[23]*.txt"
    for name, source in named.items():
        prepare(source, tokenizer, tmp_path / name, T, validation_fraction=0.2)
    assert len(named) == 8 and sum(facts(tmp_path / "mix")["documents"].values()) == 40
    assert all(samples(tmp_path / name) == samples(tmp_path / "a.jsonl") for name in named)


def test_text_column_names_the_text(tmp_path, tokenizer):
    texts = make_texts(5)
    records = [{"body": text, "text": "not this"} for text in texts]
    prepare_records(tmp_path, tokenizer, records, validation_fraction=0, text_column="body")
    assert documents_of(tmp_path / "p", "train")[0] == expected_documents(tokenizer, texts)[0]


def test_a_source_is_what_was_named_and_once(tmp_path, tokenizer, monkeypatch):
    corpora.write_jsonl(tmp_path / "a.jsonl", ["one"])
    corpora.write_jsonl(tmp_path / "b.jsonl", ["two"])
    (tmp_path / "again.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in sources.find_files("a.jsonl, b.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(sources.find_files("*.jsonl")) == 2
    for name in ("", "a.jsonl,"):
        with pytest.raises(UserError, match="does not exist"):
            sources.find_files(name)
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "elsewhere").mkdir()
    prepare("a.jsonl,b.jsonl", tokenizer, "link", 4)  # through a link
    assert (tmp_path / "elsewhere" / "preparation.json").is_file()


def test_the_samples_are_the_same_with_any_number_of_processes_and_shards(tmp_path, tokenizer, monkeypatch):
    for number, size in enumerate((1 << 20, 4096, 50_000)):
        monkeypatch.setattr(shards, "SHARD_BYTES", size)
        prepare_records(tmp_path, tokenizer, make_texts(200), str(number), num_proc=1 + number)
    assert samples(tmp_path / "0") == samples(tmp_path / "1") == samples(tmp_path / "2")


def shards_in(folder: Path) -> list[Path]:
    return list(folder.glob("p.preparing/*/shard-*.arrow"))


def start(source: str, tokenizer, target: Path):
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(source, tokenizer, target, T))
    process.start()
    return process


@pytest.mark.parametrize("count", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_and_started_again_the_samples_are_the_same(tmp_path, tokenizer, small_shards, count):
    texts = make_texts(3000)
    began = time.monotonic()
    expected = samples(prepare_records(tmp_path, tokenizer, texts, "undisturbed"))
    whole = time.monotonic() - began
    source, draw, interrupted = str(tmp_path / "a.jsonl"), random.Random(0), 0
    for number in range(count):
        target = tmp_path / f"killed{number}"
        for latest in (0.3, whole / 2, whole):
            process = start(source, tokenizer, target)
            process.join(draw.uniform(0.05, latest))
            process.kill()
            process.join()
            interrupted += not target.exists()
            assert not target.exists() or facts(target), "visible before it was whole"
        prepare(source, tokenizer, target, T)
        assert samples(target) == expected
        assert not target.with_name(target.name + ".preparing").exists()
    assert interrupted


def test_what_was_done_before_the_kill_is_not_done_again(tmp_path, tokenizer, small_shards, monkeypatch):
    source, target = str(corpora.write_jsonl(tmp_path / "a.jsonl", make_texts(3000))), tmp_path / "p"
    process = start(source, tokenizer, target)
    while len(shards_in(tmp_path)) < 10:
        time.sleep(0.005)
    process.kill()
    process.join()
    time.sleep(1)  # its workers leave with it
    done = {path: path.stat().st_mtime_ns for path in shards_in(tmp_path)}
    pack = pack_module.pack

    def look(paths, *args):
        assert len(paths) > 100, "a kill loses more than a fiftieth"
        assert done == {path: path.stat().st_mtime_ns for path in done}
        return pack(paths, *args)

    monkeypatch.setattr(prepare_module, "pack", look)
    assert not target.exists() and prepare(source, tokenizer, target, T).exists()


def test_a_tokenizing_process_that_dies_ends_the_preparation_with_a_sentence(launch, tmp_path, tiny):
    source = corpora.write_jsonl(tmp_path / "a.jsonl", ["the people of the union " * 50] * 40_000)
    flags = [f"--tokenizer_id={tiny}", f"--dataset_id={source}", f"--dataset_path={tmp_path / 'p'}"]
    run = launch("train.py", "--prepare_data", "--max_seq_len=64", *flags)
    run.wait_for(lambda: len(shards_in(tmp_path)) >= 4)
    workers = run.children()
    for pid in workers:  # the pool ends the others by SIGTERM, and waits for one that catches it
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
        assert not int(caught, 16) >> (signal.SIGTERM - 1) & 1
    os.kill(workers[0], signal.SIGKILL)
    said = run.end(code=2)
    assert "a tokenizing process was killed" in said and "Traceback" not in said
    assert len(shards_in(tmp_path)) >= 4 and not (tmp_path / "p").exists(), "what is done is kept"


def test_two_processes_at_once_do_not_harm_each_other(tmp_path, tokenizer, small_shards):
    alone = prepare_records(tmp_path, tokenizer, make_texts(500), "alone")
    both = [start(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "p") for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert samples(tmp_path / "p") == samples(alone)


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_full_disk_names_the_file_and_preparation_continues_when_there_is_room(tmp_path, tokenizer):
    source = str(corpora.write_jsonl(tmp_path / "a.jsonl", make_texts(300)))
    for size, name in {150_000: "shard-000000.arrow", 200_000: "train.arrow"}.items():
        with corpora.file_size_limit(size), pytest.raises(OSError) as failed:
            prepare(source, tokenizer, tmp_path / "p", T, num_proc=1)
        assert failed.value.filename.startswith(f"{tmp_path}/p.preparing/") and name in failed.value.filename
    assert prepare(source, tokenizer, tmp_path / "p", T).exists()


def test_preparing_again_does_nothing_and_says_so(tmp_path, tokenizer, capsys):
    before = files_of(prepare_records(tmp_path, tokenizer, make_texts(50)))
    capsys.readouterr()
    prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "p", T)
    assert "already prepared" in capsys.readouterr().out and before == files_of(tmp_path / "p")


OTHER_SETTINGS = {
    "max_seq_len 64, now 32": dict(T=32),
    "seed 0, now 1": dict(seed=1),
    "validation_fraction 0.01, now 0.5": dict(validation_fraction=0.5),
    "text_column None, now body": dict(text_column="body"),
    "another source or changed files": dict(records=make_texts(50, seed=1)),
    "another tokenizer": dict(tokenizer=real_tokenizer("smollm2-135m")),
}


@pytest.mark.parametrize("said", OTHER_SETTINGS)
def test_other_settings_are_refused_with_the_fix(tmp_path, tokenizer, said):
    settings = dict(folder=tmp_path, tokenizer=tokenizer, records=make_texts(50), T=T)
    before = files_of(prepare_records(**settings))
    with pytest.raises(UserError, match="Choose another --dataset_path") as refused:
        prepare_records(**settings | OTHER_SETTINGS[said])
    assert said in str(refused.value) and files_of(tmp_path / "p") == before


def test_the_seed_chooses_the_held_out_documents_and_equal_documents_stay_together(tmp_path, tokenizer):
    texts, held_out = make_texts(300, most=20), []
    for seed in (0, 1):
        settings = dict(validation_fraction=0.2, seed=seed)
        folder = prepare_records(tmp_path, tokenizer, texts + texts[:100], str(seed), **settings)
        train, validation = (set(map(tuple, documents_of(folder, s)[:-1])) for s in ("train", "validation"))
        assert not train & validation
        assert 80 <= facts(folder)["documents"]["validation"] <= 90  # a fifth of 400, and their doubles
        held_out.append(validation)
    assert len(held_out[0] & held_out[1]) < 40


def test_validation_gets_a_sample_wherever_there_is_enough_text(tmp_path, tokenizer, capsys):
    texts = make_texts(200, most=6)
    short = prepare_records(tmp_path, tokenizer, texts, "short", 256, validation_fraction=0.001)
    assert facts(short)["samples"]["validation"] == 1
    single = prepare_records(tmp_path, tokenizer, make_texts(1, most=300), "single", 32)
    assert "too little text to hold documents out" in capsys.readouterr().out
    assert facts(single)["documents"] == {"train": 1, "validation": 0}
    assert len(open_split(single, "validation", 32, 320)) == 0


BOUNDARIES = [("small", [], 0), ("smollm2-135m", [], 0), ("llama3", [128000], 128001)]


@pytest.mark.parametrize("name, beginning, end", BOUNDARIES)
def test_a_document_has_a_beginning_and_a_separator_and_injects_no_control_tokens(name, beginning, end):
    tokenizer = real_tokenizer(name)
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    text = "My fellow citizens" + " b".join(control) + "<|im_start|>system\n<|eot_id|>"
    ids = Encoder(tokenizer).encode([Document("here", text)])[0].tolist()
    middle = ids[len(beginning) : -1]
    assert ids == beginning + middle + [end] and tokenizer.decode(middle) == text
    assert middle == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(middle) & set(tokenizer.added_tokens_decoder)


def test_sentences_are_joined_to_documents_of_a_sample_at_least(tokenizer):
    sentences = make_texts(500, most=12)
    documents = [Document("here", text) for text in sentences]
    tokens, _, lengths, _ = Encoder(tokenizer, join_tokens=T).encode(documents)
    found = [ids.tolist() for ids in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert len(found) > 20 and all(T < len(ids) < 3 * T for ids in found)
    assert all(ids.count(0) == 1 and ids[-1] == 0 for ids in found)
    assert tokenizer.decode(sum((ids[:-1] for ids in found), [])) == "".join(s + "\n" for s in sentences)


def test_a_split_opens_whole_or_as_always_the_same_samples_from_all_over(prepared):
    everything, some, again = (
        [row["input_ids"].tolist() for row in open_split(prepared, "validation", T, 320, max_samples=most)]
        for most in (None, 10, 10)
    )
    assert everything == [row["input_ids"] for row in samples(prepared)[1]]
    positions = [everything.index(row) for row in some]
    assert len(some) == 10 and some == again and positions == sorted(positions)
    assert positions[0] == 0 and positions[-1] == len(everything) - 1


def test_a_damaged_split_and_another_command_are_said(prepared):
    (prepared / "damaged").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="p/damaged, saved by .* Remove .*/p and prepare it again"):
        open_split(prepared, "damaged", T, 320)
    with pytest.raises(UserError, match="nowhere is not prepared .*Run `make data`"):
        open_split("nowhere", "train", T, 320, command="make data")


def test_one_part_of_the_verification_finds_a_changed_or_missing_file(tmp_path, tokenizer):
    folder = prepare_records(tmp_path, tokenizer, make_texts(300))
    verify(folder)
    damaged = folder / "train" / "data-00000-of-00001.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    parts = [list(facts(folder)["files"])[part::3] for part in range(3)]
    (part,) = (n for n, names in enumerate(parts) if "train/data-00000-of-00001.arrow" in names)
    for change in (lambda: damaged.write_bytes(content), lambda: damaged.write_bytes(b""), damaged.unlink):
        change()
        with pytest.raises(UserError, match=f"{damaged} does not match its checksum .* prepare it again"):
            verify(folder, part, 3)
        verify(folder, (part + 1) % 3, 3)
        verify(folder, (part + 2) % 3, 3)


def test_data_of_an_earlier_format_are_refused_with_the_fix(tmp_path, tokenizer):
    folder = prepare_records(tmp_path, tokenizer, make_texts(50))
    said = facts(folder)
    said["settings"]["format"] -= 1
    said.pop("files")
    (folder / "preparation.json").write_text(json.dumps(said))
    for use in (verify, fingerprint, lambda path: open_split(path, "train", T, 320)):
        with pytest.raises(UserError, match="format 3 .* format 4. Remove .* prepare it again"):
            use(folder)


def test_a_fingerprint_depends_on_samples_and_settings_not_on_paths_and_times(tmp_path, tokenizer):
    found = {}
    for name, count, seed in (("a", 50, 0), ("b", 50, 0), ("seed", 50, 1), ("fewer", 40, 0)):
        (tmp_path / name).mkdir()
        source = corpora.write_jsonl(tmp_path / name / "a.jsonl", make_texts(count))
        source.write_text(source.read_text() + " " * (4 << 20))  # its identity has the time of a large file
        os.utime(source, (len(found), len(found)))
        found[name] = fingerprint(prepare(str(source), tokenizer, tmp_path / name / "p", T, seed=seed))
    assert found["a"] == found["b"] and len({*found.values()}) == 3


def test_training_must_ask_for_the_flags_of_the_data_in_any_spelling(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpora.write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    prepare("a.jsonl", tokenizer, "p", T, validation_fraction=0.1)
    for same in ("./a.jsonl", str(tmp_path / "a.jsonl"), "a.jsonl/"):
        check_prepared("p", tokenizer, dataset_id=same, validation_fraction=0.1)
    check_prepared("p", tokenizer, text_column=None)
    with pytest.raises(UserError, match="--text_column is body. Leave --text_column out"):
        check_prepared("p", tokenizer, text_column="body")


def test_git_does_not_see_prepared_data(tmp_path, tokenizer):
    prepare_records(tmp_path, tokenizer, make_texts(50))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    seen = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert seen == "?? a.jsonl\n"


def slow_batch(batch_rows, B):
    """What the collator promises, a token at a time: a document's end is a target, its first token never."""
    ids, labels, positions, bounds = [], [], [], [0]
    missing = dict(input_ids=[0] * T, document_starts=[], loss_mask=[False] * T)
    for row in batch_rows + [missing] * (B - len(batch_rows)):
        tokens, mask = list(row["input_ids"]), row["loss_mask"]
        starts = sorted({0, *row["document_starts"]}) + [T]
        labels.append([-100 if t + 1 in starts or not mask[t + 1] else tokens[t + 1] for t in range(T)])
        positions.append([t - max(start for start in starts if start <= t) for t in range(T)])
        bounds += [len(ids) * T + start for start in starts[1:]]
        ids.append(tokens)
    return ids, labels, positions, bounds


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_a_batch_is_what_it_promises_whatever_rows_are_missing(prepared, count):
    draw = np.random.default_rng(0)
    given = [dict(row) for row in open_split(prepared, "train", T, 320).select(range(count))]
    given = [row | dict(loss_mask=draw.random(T) < 0.7) if n % 2 else row for n, row in enumerate(given)]
    batch = Collator(T, 4)(given)
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    assert tuple(batch[name].tolist() for name in names) == slow_batch(given, 4)
    assert [batch[name].dtype for name in names] == [torch.int64] * 3 + [torch.int32]
    assert batch["num_tokens"] == count * T


def test_a_preparation_that_drops_much_of_the_text_says_so_once(tmp_path, tokenizer, capsys):
    for count, warned in ((1, 1), (50, 0)):
        prepare_records(tmp_path, tokenizer, ["x" * (T + 20)] * count, str(count), validation_fraction=0)
        said = capsys.readouterr().out
        assert said.count("warning: ") == warned and ("85 tokens fill no sample" in said) == warned


def test_the_summary_shows_counts_lengths_and_a_sample(tmp_path, tokenizer, capsys):
    known = facts(prepare_records(tmp_path, tokenizer, make_texts(80)))
    said = capsys.readouterr().out
    for name in ("documents", "tokens", "samples", "dropped_tokens", "documents_by_length"):
        assert all(f"{count:,}" in said for count in known[name].values())
    assert "documents by length" in said and "N[[umber 0." in said


@pytest.mark.slow
def test_a_gigabyte_is_prepared_in_under_2_gigabytes_of_memory_a_process():
    done = python("benchmarks/data.py", "--gigabytes=1", "--kind=jsonl", timeout=1500)
    peaks = [float(peak) for peak in re.findall(r"([0-9.]+) GiB of the", done.stdout)]
    assert len(peaks) == 2 and max(peaks) < 1.8, done.stdout[-500:]


@pytest.mark.parametrize("name", ["smollm2-135m", "llama3", "small"])
def test_bits_per_byte_counts_the_bytes_of_the_targets_text(name):
    tokenizer, text = real_tokenizer(name), "naïve 中文 😀  1790's\n\tend" + "the union"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = document_separator(tokenizer)
    row = dict(input_ids=[end, *ids, end], document_starts=[0], loss_mask=[1] * (len(ids) + 2))
    bits = 2.5 * (len(ids) + 1) / math.log(2)  # the end is a target without text
    assert bits_per_byte([row, row], tokenizer, 2.5) == pytest.approx(bits / len(text.encode()), rel=1e-12)
    last = len(tokenizer.decode(ids[-1:]).encode())
    masked = row | dict(loss_mask=[0] * len(ids) + [1, 1])  # only the last token and the end
    assert bits_per_byte([masked], tokenizer, 2.5) == pytest.approx(2.5 * 2 / math.log(2) / last, rel=1e-12)
    with pytest.raises(UserError, match="no text to predict"):
        bits_per_byte([row | dict(loss_mask=[0] * (len(ids) + 2))], tokenizer, 2.5)


def test_bits_per_byte_of_tokens_that_are_not_bytes_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁the": 0, "<end>": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", name_or_path="words")
    row = dict(input_ids=[1, 0], document_starts=[0])
    with pytest.raises(UserError, match="words has token '▁the'"):
        bits_per_byte([row], tokenizer, 1.0)
