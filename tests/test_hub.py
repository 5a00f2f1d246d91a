"""Models and data sets come from the hub, and its troubles are sentences: real clients, a hub on loopback."""

import json
import math
import socket

import pytest
from helpers.corpora import facts, make_texts, rows, table_bytes
from helpers.hub import serve
from helpers.runs import python

SENTENCES = make_texts(2000, most=12)
# One process tries every case and prints what each returns, or its error.
TRY_ALL = """
import json, os, sys
from errors import UserError
import downloads
from dataset import sources
from llama3 import assets
downloads.RETRY_SECONDS = (0.01, 0.01, 0.01)
readers = {
    "config": lambda name: assets.load_config(name).hidden_size,
    "weights": lambda name: len(assets.weight_files(name)),
    "tokenizer": lambda name: len(assets.load_tokenizer(name)),
    "dataset": lambda name: len(sources.load_from_hub(name)),
}
found = {}
for case in json.loads(sys.argv[1]):
    try:
        found[case] = readers[case.split()[0]](case.split()[1])
    except UserError as error:
        found[case] = str(error)
print(json.dumps(found), flush=True)
os._exit(0)  # a thread of pyarrow's may still close a file, and aborts a process that ends in the meantime
"""


GATED, DOWN = ["gated", "HF_TOKEN", "--demo", "https://huggingface.co/here/"], ["local folder", "--demo"]
# What each case returns, or words of its error.
EXPECTED = {
    "config here/good": 32,
    "tokenizer here/good": 320,
    "weights here/good": 30,
    "config here/busy": 32,  # a retry cures what passes
    "config here/dropping": 32,
    "config here/gated": GATED,
    "weights here/forbidden": GATED,
    "tokenizer here/missing": ["here/missing", "not on the hub", "Check the name"],
    "config here/jammed": ["answered 429", *DOWN],
    "config here/broken": ["answered 503", *DOWN],
    "config here/unreliable": ["connection dropped", *DOWN],
    "dataset here/rows": 300,
    "dataset here/script:b": 70,
    "dataset here/script": ["choose one of its configurations: a, b"],
    "dataset here/gated": ["HF_TOKEN", "https://huggingface.co/datasets/here/gated"],
    "dataset here/missing": ["not on the hub"],
    "dataset here/no-train": ["train"],
}
TROUBLE = {"busy": (429, 2), "dropping": ("drop", 2), "gated": (401, math.inf), "forbidden": (403, math.inf)}
TROUBLE |= {"jammed": (429, math.inf), "broken": (503, math.inf), "unreliable": ("drop", math.inf)}


@pytest.fixture(scope="module")
def hub(tiny):
    model = {path.name: path.read_bytes() for path in tiny.iterdir()}
    script = {"bookcorpus.py": b"raise SystemExit('a data set script was run')", "README.md": b""}
    repos = {("models", f"here/{name}", "main"): model for name in ("good", *TROUBLE)}
    repos |= {("datasets", name, "main"): script for name in ("here/script", "bookcorpus/bookcorpus")}
    converted = {f"{name}/train/0000.parquet": table_bytes(SENTENCES[:70]) for name in "ab"}
    splits = {"train.parquet": table_bytes(SENTENCES[:300]), "test.parquet": table_bytes(SENTENCES[:5])}
    book = {"plain_text/train/0000.parquet": table_bytes(SENTENCES)}
    repos |= {
        ("datasets", "here/rows", "main"): splits,
        ("datasets", "here/gated", "main"): {"train.parquet": table_bytes(SENTENCES)},
        ("datasets", "here/no-train", "main"): {"test.parquet": table_bytes(SENTENCES)},
        ("datasets", "here/script", "refs/convert/parquet"): converted,
        ("datasets", "bookcorpus/bookcorpus", "refs/convert/parquet"): book,
    }
    with serve(repos, {f"here/{name}": trouble for name, trouble in TROUBLE.items()}) as address:
        yield address


def try_all(cases: list[str], folder, **env) -> dict:
    """What each case ("KIND NAME") returns, or its error."""
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder)} | env
    return json.loads(python("-c", TRY_ALL, json.dumps(cases), real=True, **env).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def home(hub, tmp_path_factory):
    """A cache of the hub, into which every case was tried once, and what each returned."""
    folder = tmp_path_factory.mktemp("home")
    return folder, try_all([*EXPECTED], folder, HF_ENDPOINT=hub)


def test_models_and_data_come_from_the_hub_no_script_runs_and_troubles_are_sentences(home):
    for case, found in home[1].items():
        expected = EXPECTED[case]
        right = found == expected if isinstance(expected, int) else all(word in found for word in expected)
        assert right, (case, found)


def test_without_a_network_the_cache_is_used_and_the_rest_is_a_sentence(hub, home):
    cached, model, dataset = "config here/good", "config here/never", "dataset here/never"
    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        unreachable = try_all([cached, model], home[0], HF_ENDPOINT=nowhere)
    offline = try_all([cached, model, dataset], home[0], HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    for found, trouble in ((unreachable, "cannot be reached"), (offline, "HF_HUB_OFFLINE is set")):
        assert found.pop(cached) == 32
        assert all(trouble in error and "--demo" in error for error in found.values()), found


def test_bookcorpus_sentences_become_documents_of_at_least_a_sample(hub, tiny, tmp_path):
    prepared, home = tmp_path / "prepared", str(tmp_path / "home")
    command = ["train.py", "--prepare_data", f"--model_id={tiny}", "--max_seq_len=64"]
    command.append(f"--dataset_path={prepared}")
    python(*command, real=True, HF_HOME=home, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub)
    summary = facts(prepared)
    assert sum(summary["documents"].values()) < len(SENTENCES) / 2
    assert set(summary["documents_by_length"]) == {"64-127"}
    assert len(rows(prepared, "train")) == summary["samples"]["train"]
    assert "already prepared" in python(*command).stdout, "finding prepared data needs no hub"
