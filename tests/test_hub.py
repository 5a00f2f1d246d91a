"""The hub, its data sets and its troubles: the real clients against a hub on loopback."""

import io
import json
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import facts, make_texts, rows
from helpers.hub import serve
from helpers.runs import ROOT, environment

SENTENCES = make_texts(2000, most=12)
# Each case is tried in turn, in one process: what it gives or the error's words.
CASES = """
import json, sys
from llama3 import assets, sources
assets.RETRY_SECONDS = (0.01, 0.01, 0.01)
found = {}
for name, (kind, what) in json.loads(sys.argv[1]).items():
    try:
        if kind == "config":
            found[name] = assets.load_config(what).hidden_size
        elif kind == "weights":
            found[name] = sorted(assets.weight_files(what))
        elif kind == "tokenizer":
            found[name] = len(assets.load_tokenizer(what))
        else:
            found[name] = len(sources.load_from_hub(what))
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def parquet(texts) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


def lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def hub(tiny):
    model = {path.name: path.read_bytes() for path in tiny.iterdir()}
    script = {"bookcorpus.py": b"raise SystemExit('a data set script was run')", "README.md": b""}
    good = ["good", "busy", "dropping", "gated", "forbidden", "jammed", "broken", "unreliable"]
    repos = {("models", f"here/{name}", "main"): model for name in good}
    repos |= {
        ("models", "here/other-kind", "main"): {"config.json": b'{"model_type": "gpt2"}'},
        ("models", "here/pickled", "main"): {
            "config.json": model["config.json"],
            "pytorch_model.bin": b"\x80",
        },
        ("datasets", "here/rows", "main"): {
            "train.jsonl": lines(SENTENCES[:300]),
            "test.jsonl": lines(SENTENCES[:5]),
        },
        ("datasets", "here/gated", "main"): {"train.jsonl": lines(SENTENCES)},
        ("datasets", "here/no-train", "main"): {"test.jsonl": lines(SENTENCES)},
        ("datasets", "here/script", "main"): script,
        ("datasets", "here/script", "refs/convert/parquet"): {
            f"{name}/train/0000.parquet": parquet(SENTENCES[:70]) for name in "ab"
        },
        ("datasets", "bookcorpus/bookcorpus", "main"): script,
        ("datasets", "bookcorpus/bookcorpus", "refs/convert/parquet"): {
            "plain_text/train/0000.parquet": parquet(SENTENCES)
        },
    }
    trouble = {
        "here/gated": ("gated", None),
        "here/forbidden": ("forbidden", None),
        "here/busy": ("429", 2),
        "here/dropping": ("drop", 2),
        "here/jammed": ("429", None),
        "here/broken": ("503", None),
        "here/unreliable": ("drop", None),
    }
    with serve(repos, trouble) as address:
        yield address


def try_all(cases: dict, folder, **env) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CASES, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=environment(**{"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder)} | env),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_models_come_from_the_hub_and_its_troubles_are_sentences(hub, tmp_path):
    cases = {
        "config": ("config", "here/good"),
        "weights": ("weights", "here/good"),
        "tokenizer": ("tokenizer", "here/good"),
        "busy": ("config", "here/busy"),
        "dropping": ("config", "here/dropping"),
        "gated": ("config", "here/gated"),
        "forbidden": ("weights", "here/forbidden"),
        "missing": ("tokenizer", "here/missing"),
        "jammed": ("config", "here/jammed"),
        "broken": ("config", "here/broken"),
        "unreliable": ("config", "here/unreliable"),
        "other kind": ("config", "here/other-kind"),
        "pickled": ("weights", "here/pickled"),
        "no id": ("config", "a/b/c"),
    }
    found = try_all(cases, tmp_path, HF_ENDPOINT=hub)
    assert (
        found["config"] == 32
        and found["tokenizer"] == 320
        and "model.embed_tokens.weight" in found["weights"]
    )
    assert found["busy"] == found["dropping"] == 32, "what a retry cures is cured"
    for name in ("gated", "forbidden"):
        for word in ("gated", "HF_TOKEN", f"https://huggingface.co/here/{name}", "--demo"):
            assert word in found[name]
    for name, words in {
        "missing": ("here/missing", "not on the hub", "check the name"),
        "jammed": ("answered 429", "local folder", "--demo"),
        "broken": ("answered 503", "local folder", "--demo"),
        "unreliable": ("connection dropped", "local folder", "--demo"),
        "other kind": ("'gpt2'", "'llama'"),
        "pickled": ("safetensors", "--from_scratch"),
        "no id": ("neither a folder", "owner/name"),
    }.items():
        assert all(word in found[name] for word in words), found[name]


def test_data_sets_come_from_the_hub_without_running_their_scripts(hub, tmp_path):
    cases = {
        "rows": ("dataset", "here/rows"),
        "script": ("dataset", "here/script:b"),
        "script of several": ("dataset", "here/script"),
        "gated": ("dataset", "here/gated"),
        "missing": ("dataset", "here/missing"),
        "no train split": ("dataset", "here/no-train"),
    }
    found = try_all(cases, tmp_path, HF_ENDPOINT=hub)
    assert found["rows"] == 300 and found["script"] == 70
    assert "choose one of its configurations: a, b" in found["script of several"]
    assert "HF_TOKEN" in found["gated"] and "https://huggingface.co/datasets/here/gated" in found["gated"]
    assert "not on the hub" in found["missing"] and "train" in found["no train split"]


def test_without_a_network_or_offline_is_a_sentence_and_what_is_cached_is_used(hub, tmp_path):
    assert try_all({"first": ("config", "here/good")}, tmp_path, HF_ENDPOINT=hub)["first"] == 32
    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        cases = {
            "cached": ("config", "here/good"),
            "model": ("config", "here/never"),
            "dataset": ("dataset", "here/never"),
        }
        unreachable = try_all(
            {name: cases[name] for name in ("cached", "model")}, tmp_path, HF_ENDPOINT=nowhere
        )
    offline = try_all(cases, tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert unreachable["cached"] == offline["cached"] == 32
    for found, said in ((unreachable, "cannot be reached"), (offline, "HF_HUB_OFFLINE is set")):
        for name in found.keys() - {"cached"}:
            assert said in found[name] and "--demo" in found[name], found[name]


def test_bookcorpus_is_prepared_from_its_parquet_conversion_in_documents_of_a_sample_at_least(
    hub, tiny, tmp_path
):
    command = [
        sys.executable,
        "train.py",
        "--prepare_data",
        f"--model_id={tiny}",
        "--max_seq_len=64",
        f"--dataset_path={tmp_path / 'p'}",
    ]
    env = environment(HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=hub)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    known = facts(tmp_path / "p")
    assert sum(known["documents"].values()) < len(SENTENCES) / 2
    lengths = {name for name in known["documents_by_length"]}
    assert lengths == {"64-127"}, lengths
    again = subprocess.run(
        command, cwd=ROOT, env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True, timeout=200
    )
    assert "already prepared" in again.stdout, "no hub is needed to find that nothing is to do"
    assert len(rows(tmp_path / "p", "train")) == known["samples"]["train"]
