"""--doctor finds what is wrong with a set-up, one line each with the fix, and nothing where nothing is."""

import json
import math
import shutil
import socket
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from helpers.hub import serve
from helpers.runs import outputs, python
from safetensors.torch import load_file

import train
from cli import doctor as cli_doctor
from cli.config import parse
from dataset.batches import Collator, open_split
from errors import UserError
from tools import doctor


def report(*argv, check=True, **env):
    """The findings by their names, how the command ended, and what it took in seconds."""
    began, out = time.perf_counter(), Path(argv[-1])
    done = python("train.py", "--doctor", *argv[:-1], f"--output_path={out}", check=check, **env)
    found = json.loads(out.read_text())
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.split()[:1][0] in doctor.STATUSES]
    assert [line.split()[:2] for line in lines] == [[row["status"], row["check"]] for row in found["checks"]]
    return {row["check"]: row for row in found["checks"]}, found["status"], done, time.perf_counter() - began


def findings(argv: list, *wanted: str) -> dict[str, doctor.Finding]:
    """The findings of these checks and of those that others follow from, in this process."""
    needed = {"devices", "model", "data", *wanted}
    pairs = cli_doctor.machine_checks(parse(["--doctor", *argv]))
    return {name: doctor.examine(name, check) for name, check in pairs if name in needed}


def test_a_healthy_set_up_has_no_fault(flags, tiny, prepared, tmp_path):
    found, status, done, seconds = report(*flags, *outputs(tmp_path), tmp_path / "report.json")
    names = "versions devices compiler host_name collectives hub model memory disk data labels sample".split()
    assert [*found] == names and seconds < 120  # on a busy machine; else it takes ten
    assert {row["status"] for row in found.values()} <= {"ok", "warning"} and done.returncode == 0
    assert all(row["fix"] for row in found.values() if row["status"] == "warning")
    assert status == max((row["status"] for row in found.values()), key=doctor.STATUSES.index)
    parameters = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert f"{parameters:,} parameters train" in found["model"]["detail"]
    assert "sum right over 2 ranks" in found["collectives"]["detail"]
    samples = len(open_split(prepared, "train", 32, 320))
    assert f"{samples} samples of 32 tokens" in found["data"]["detail"]
    assert not (tmp_path / "ckpt").exists() and not (tmp_path / "log").exists()


def test_damaged_data_are_a_fault_and_exit_code_1(flags, prepared, tmp_path, monkeypatch, capsys):
    copy = Path(shutil.copytree(prepared, tmp_path / "data"))
    file = next(copy.glob("validation/*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    every = cli_doctor.machine_checks

    def few(args):
        names = ("devices", "model", "disk", "data", "labels")
        return ((name, check) for name, check in every(args) if name in names)

    monkeypatch.setattr(cli_doctor, "machine_checks", few)
    argv = [*flags, f"--dataset_path={copy}", f"--output_path={tmp_path / 'report.json'}"]
    assert train.main(["--doctor", *argv]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    checks = {row["check"]: row for row in report["checks"]}
    assert (checks["data"]["status"], report["status"]) == ("fault", "fault")
    assert file.name in checks["data"]["detail"] and "prepare it again" in checks["data"]["fix"]
    assert "labels" not in checks and checks["disk"]["status"] == "ok"
    assert "checks failed: data" in capsys.readouterr().err


def test_another_version_is_a_warning_and_a_missing_library_a_fault(tmp_path):
    requirements = (doctor.ROOT / "requirements.txt").read_text()
    file, pin = tmp_path / "requirements.txt", f"safetensors=={version('safetensors')}"
    assert pin in requirements
    for text, status in (
        (requirements, "ok"),
        (requirements.replace(pin, "safetensors==0.0.1"), "warning"),
        (requirements + "never-released==1.0  # a comment\n", "fault"),
        (requirements + 'never-released==1.0; python_version < "3"\n', "ok"),
    ):
        file.write_text(text)
        found = doctor.examine("versions", lambda: doctor.versions(file))
        # Another version than the tested ones may run these tests.
        assert found.status == status or (found.status == "warning" and "safetensors" not in found.detail)
        if status == "warning":
            assert (
                f"safetensors {version('safetensors')} (tested: 0.0.1)" in found.detail and "pip" in found.fix
            )
    file.write_text(requirements + "never-released==1.0\n")
    assert "never-released" in doctor.versions(file)[1]


@pytest.mark.parametrize("free, status", [(10, "ok"), (3.5, "fault"), (0.5, "fault")])
def test_too_little_disk_is_a_fault_with_the_number_that_fits(
    flags, tiny, tmp_path, monkeypatch, free, status
):
    size = 12 * sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    usage = shutil.disk_usage(tmp_path)._replace(free=int(free * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    save = ["--save_every_n_train_steps=2", "--max_train_steps=7", *outputs(tmp_path / "new")]
    found = findings([*flags, *save], "disk")["disk"]
    assert found.status == status and found.detail.startswith("4 x ")
    assert ("--keep_last_n_checkpoints=1," in found.fix) == (free == 3.5)
    assert ("another --save_dir" in found.fix) == (status == "fault")
    if free == 3.5:  # the fix is right: it keeps the last one beside the best, and writes another
        assert findings([*flags, *save, "--keep_last_n_checkpoints=1"], "disk")["disk"].status == "ok"


def test_checkpoints_are_counted_as_they_are_saved(flags, prepared, tmp_path):
    samples, steps = len(open_split(prepared, "train", 32, 320)), 200
    epochs = math.ceil(steps * 4 / samples)  # a checkpoint at each one's end, and at the run's
    found = findings([*flags, f"--max_train_steps={steps}", *outputs(tmp_path)], "disk")["disk"]
    assert found.detail.startswith(f"{epochs} x ") and epochs > 1


def test_a_model_that_does_not_fit_is_a_fault_and_only_adapters_train(flags, tiny, tmp_path):
    found = findings([*flags, "--mem_constraint=1", "--lora_rank=2", *outputs(tmp_path)], "memory")
    shapes = [
        tensor.shape for name, tensor in load_file(tiny / "model.safetensors").items() if "proj" in name
    ]
    assert f"{sum(2 * sum(shape) for shape in shapes):,} parameters train" in found["model"].detail
    large = ["--from_scratch", "--num_hidden_layers=200", "--max_seq_len=32", *outputs(tmp_path)]
    found = findings(large, "memory")
    assert found["model"].status == found["memory"].status == "fault"
    assert "GiB" in found["model"].detail and "fewer layers" in found["model"].fix


# Prints what the check says of each [repository, token, is offline?].
ASK = """
import json, os, sys
from functools import partial
from huggingface_hub import constants
from tools import doctor
found = []
for name, token, constants.HF_HUB_OFFLINE in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    found.append(doctor.examine("hub", partial(doctor.hub, {name: "config.json"})))
print(json.dumps(found))
"""


def test_gated_and_missing_models_are_faults_no_network_is_a_warning_and_no_token_is_shown(tiny, tmp_path):
    def ask(address: str, *cases: tuple) -> list[doctor.Finding]:
        done = python("-c", ASK, json.dumps(cases), real=True, HF_HOME=str(tmp_path), HF_ENDPOINT=address)
        assert "hf_secret" not in done.stdout + done.stderr
        return [doctor.Finding(*found) for found in json.loads(done.stdout.splitlines()[-1])]

    model = {path.name: path.read_bytes() for path in tiny.iterdir()}
    repos = {("models", f"here/{name}", "main"): model for name in ("good", "gated", "forbidden")}
    trouble = {"here/gated": (401, math.inf), "here/forbidden": (403, math.inf)}
    names = [f"here/{name}" for name in ("good", "gated", "forbidden", "missing")]
    more = [("here/gated", "", False), ("here/good", "", True)]
    with serve(repos, trouble) as address:
        *found, without, offline = ask(address, *[(name, "hf_secret", False) for name in names], *more)
    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        (nowhere,) = ask(f"http://127.0.0.1:{closed.getsockname()[1]}", ("here/good", "", False))
    assert [finding.status for finding in found] == ["ok", "fault", "fault", "fault"]
    assert all("a token is set" in finding.detail for finding in found)
    assert "no token (HF_TOKEN) is set" in without.detail and "gated" in without.detail
    assert "https://huggingface.co/here/gated" in without.fix and "HF_TOKEN" in without.fix
    assert (offline.status, nowhere.status) == ("warning", "warning")
    assert "HF_HUB_OFFLINE is set" in offline.detail and "cannot be reached" in nowhere.detail


def test_only_what_the_run_reads_of_the_hub_is_asked_for(tiny):
    def asked(*argv):
        return cli_doctor.hub_files(parse(argv).config)

    llama = "meta-llama/Meta-Llama-3-8B-Instruct"
    assert asked() == {llama: "config.json"} and asked("--mini") == asked("--demo") == {}
    assert asked(f"--model_id={tiny}") == asked("--model_id=./gone") == {}
    both = {"a/tokenizer": "tokenizer.json", "a/model": "config.json"}
    assert asked("--model_id=a/model", "--tokenizer_id=a/tokenizer") == both


class Broken(Collator):
    """Collates, and then spoils a part of the batch."""

    def __init__(self, name: str, spoil):
        super().__init__(32, 1)
        self.name, self.spoil = name, spoil

    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {self.name: self.spoil(batch)}


# What is spoilt, how -> what the check says.
SPOILT = {
    "not shifted": ("labels", lambda batch: batch["input_ids"], "the label of token 0"),
    "shifted twice": ("labels", lambda batch: batch["labels"].roll(-1), "is not the next token"),
    "a document's first": ("labels", lambda batch: batch["input_ids"].roll(-1), "is not the next token"),
    "positions": ("position_ids", lambda batch: batch["position_ids"] + 1, "token 0 has position 1"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_labels_that_are_wrong_are_a_fault(prepared, case):
    rows = open_split(prepared, "train", 32, 320, max_samples=8)
    assert doctor.labels(rows, Collator(32, 1), {0})[0] == "ok"
    name, spoil, said = SPOILT[case]
    status, detail, fix = doctor.labels(rows, Broken(name, spoil), {0})
    assert status == "fault" and said in detail and fix


def test_masked_targets_and_ends_are_counted_and_missing_ones_are_a_fault():
    def row(mask):
        return dict(
            input_ids=np.array([7, 5, 0, 9, 5, 0]), document_starts=np.array([0, 3]), loss_mask=np.array(mask)
        )

    collate = Collator(6, 1)  # four targets at most: 5 and 0 of both documents
    status, detail, _ = doctor.labels([row([1, 0, 1, 1, 0, 1])], collate, {0})
    assert status == "ok" and "50.0% masked, 2 of 2 ends learned" in detail
    for mask, said in (
        ([0] * 6, "nothing is learned"),
        ([1, 1, 0, 1, 1, 0], "no end of a text or an answer"),
    ):
        status, detail, fix = doctor.labels([row(mask)], collate, {0})
        assert status == "fault" and said in detail and fix


def test_whatever_a_check_raises_is_a_fault():
    def fails(error):
        def check():
            raise error

        return doctor.examine("name", check)

    assert fails(UserError("no x (but: y)", "Give z (or: a)"))[1:] == (
        "fault",
        "no x (but: y)",
        "Give z (or: a)",
    )
    assert fails(KeyError("x"))[:3] == ("name", "fault", "KeyError: 'x'")


def test_a_compiler_that_is_missing_is_a_fault_only_where_it_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    assert [doctor.compiler(needed)[0] for needed in (True, False)] == ["fault", "warning"]
    assert "--compile=off" in doctor.compiler(True)[2]


def test_ranks_that_cannot_work_together_are_a_fault(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1': raise SystemExit('RuntimeError: lost')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 40)
    status, detail, fix = doctor.collectives(2)
    assert status == "fault" and "2 ranks cannot work together" in detail and "NCCL_DEBUG" in fix
