"""nnScaler 0.8 itself under train.py, on a CPU: it trains as our engine does, resumes, merges, exports."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import ROOT, environment, make_model, python, rows

pytest.importorskip("nnscaler", reason="nnScaler is not installed (requirements-nnscaler.txt)")
pytestmark = pytest.mark.nnscaler

ON_CPU = ROOT / "tests" / "helpers" / "nnscaler_cpu.py"
SPLIT = ("--plan_ngpus=2", "--pas_policy=tp")
TEN_STEPS = ["--global_batch_size=8", "--lr_scheduler=cosine", "--warmup_steps=3", "--max_train_steps=10"]


class Runs:
    """Starts train.py on either engine, each run in a folder of its own."""

    def __init__(self, folder, flags):
        self.folder, self.flags = folder, [*flags, *TEN_STEPS, "--pas_policy=dp"]

    def argv(self, name, *more):
        folders = [f"--save_dir={self.folder / name / 'ckpt'}", f"--log_dir={self.folder / name / 'log'}"]
        return [*self.flags, *folders, *more]

    def start(self, ranks, *argv):
        """Under torchrun, in the folder: generated code and profiles stay there. Returns stdout."""
        torchrun = ["-m", "torch.distributed.run", "--local-addr=127.0.0.1", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *torchrun, *map(str, argv)]
        home = environment(HOME=str(self.folder))
        done = subprocess.run(command, cwd=self.folder, env=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def train(self, engine, name, ranks, *more):
        """Returns step -> training loss, and "val" -> the last validation loss."""
        script = [ON_CPU, ROOT / "train.py"][engine == "native" :]
        self.start(ranks, *script, *self.argv(name, f"--engine={engine}", *more))
        train, val = (rows(self.folder / name / "log", f"{kind}_loss") for kind in ("train", "val"))
        losses = {step: row["train_loss"] for step, row in train.items()}
        return losses | {"val": list(val.values())[-1]["val_loss"]}

    nnscaler = functools.partialmethod(train, "nnscaler")
    native = functools.partialmethod(train, "native")

    def merge(self, name, folder, out_file):
        python("train.py", *self.argv(name, f"--merge_checkpoint={folder}", f"--output_path={out_file}"))


def held(folder, rank):
    """Elements of the model that a rank's shard holds."""
    shard = torch.load(folder / f"{rank}.ckpt", weights_only=False)["model"]
    return sum(value.numel() for value in shard.values() if torch.is_tensor(value))


def assert_close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < tolerance, (found, expected)


def after(losses, step):
    return {key: loss for key, loss in losses.items() if key == "val" or key > step}


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("nnscaler"), flags)


@pytest.fixture(scope="module")
def whole(runs):
    """Ten steps on two ranks of nnScaler, saved after the fifth, and merged from there."""
    losses = runs.nnscaler("whole", 2, "--save_every_n_train_steps=5")
    shutil.copytree(runs.folder / "whole" / "ckpt" / "0000-0005", runs.folder / "half")
    runs.merge("whole", runs.folder / "half", runs.folder / "merged.ckpt")
    return losses


@pytest.fixture(scope="module")
def plain(runs):
    """Ten steps of our engine on one rank."""
    return runs.native("plain", 1)


@pytest.fixture(scope="module")
def split(runs):
    """Ten steps of one copy of the model on two ranks, saved after the fifth, and merged from there."""
    losses = runs.nnscaler("split", 2, *SPLIT, "--save_every_n_train_steps=5")
    shutil.copytree(runs.folder / "split" / "ckpt" / "0000-0005", runs.folder / "half-split")
    runs.merge("split", runs.folder / "half-split", runs.folder / "merged-split.ckpt")
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_engines_have_the_same_losses(runs, ranks):
    theirs, ours = runs.nnscaler(f"n{ranks}", ranks), runs.native(f"o{ranks}", ranks)
    for step in ours:  # the table of the README
        print(f"{ranks} ranks, step {step}: nnscaler {theirs[step]:.6f} native {ours[step]:.6f}")
    assert_close(theirs, ours)
    assert not list(runs.folder.glob(".nnscaler/*"))  # the generated code is removed


def test_a_copy_of_the_model_over_two_ranks_has_the_same_losses(runs, split, plain, whole):
    assert_close(split, plain)
    found, expected = (rows(runs.folder / name / "log", "gnorm") for name in ("split", "plain"))
    for step, row in expected.items():
        assert abs(row["gnorm"] - found[step]["gnorm"]) < 1e-4 * row["gnorm"]
        assert row["tokens"] == found[step]["tokens"]
    copy = held(runs.folder / "half", 0)
    assert all(held(runs.folder / "half-split", rank) < 0.8 * copy for rank in (0, 1))


@pytest.mark.parametrize("policy", ["tp", pytest.param("autodist", marks=pytest.mark.slow)])
def test_two_copies_over_two_ranks_each_have_the_same_losses(runs, plain, policy):
    assert_close(runs.nnscaler(f"two-{policy}", 4, "--plan_ngpus=2", f"--pas_policy={policy}"), plain)


@pytest.mark.slow
def test_autodist_partitions_a_copy_over_two_ranks_and_recomputes(runs, plain, whole):
    theirs = runs.nnscaler("auto", 2, "--plan_ngpus=2", "--pas_policy=autodist", "--recompute=full")
    assert_close(theirs, plain)
    assert held(runs.folder / "auto" / "ckpt" / "last", 0) < held(runs.folder / "half", 0)


@pytest.mark.parametrize(
    "source, ranks, partition",
    [
        ("half-split", 2, SPLIT),
        ("half-split", 2, ()),  # as many ranks, but each holds all of the model
        ("half-split", 4, SPLIT),
        ("merged-split.ckpt", 2, SPLIT),
    ],
)
def test_a_partitioned_copy_resumes_on_any_ranks_partitioned_or_not(runs, split, source, ranks, partition):
    resume = f"--resume_from={runs.folder / source}"
    resumed = runs.nnscaler(f"{source}-{ranks}-{len(partition)}", ranks, *partition, resume)
    assert_close(resumed, after(split, 5))


def test_a_whole_copy_resumes_partitioned_and_a_partitioned_one_is_exported(runs, whole, split):
    resumed = runs.nnscaler("whole-split", 2, *SPLIT, f"--resume_from={runs.folder / 'half'}")
    assert_close(resumed, after(whole, 5))
    argv = [f"--export_hf={runs.folder / 'half-split'}", f"--output_path={runs.folder / 'hf-split'}"]
    python("train.py", *runs.argv("split", *argv))
    argv = [*SPLIT, "--evaluate", f"--model_id={runs.folder / 'hf-split'}"]  # the training's flags stay
    ours = python("train.py", *runs.argv("split", *argv))
    saved = rows(runs.folder / "split" / "log", "val_loss")[5]["val_loss"]
    assert abs(float(ours.stdout.splitlines()[-1].split("=")[1].split()[0]) - saved) < 1e-4


@pytest.mark.slow
def test_autodist_with_recompute_has_the_same_losses(runs):
    theirs = runs.nnscaler("autodist", 2, "--pas_policy=autodist", "--recompute=full")
    assert_close(theirs, runs.native("plain", 2))


def test_tied_embeddings_have_the_same_losses_and_resume_from_a_merged_file(runs, tmp_path):
    tied = f"--model_id={make_model(tmp_path / 'tied', tie_word_embeddings=True)}"
    theirs = runs.nnscaler("tied", 2, tied, "--save_every_n_train_steps=5")
    assert_close(theirs, runs.native("tied-native", 2, tied))
    runs.merge("tied", runs.folder / "tied" / "ckpt" / "0000-0005", tmp_path / "merged.ckpt")
    merged = f"--resume_from={tmp_path / 'merged.ckpt'}"
    assert_close(runs.nnscaler("tied-merged", 1, tied, merged), after(theirs, 5))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("source", ["half", "merged.ckpt"])
def test_shards_and_the_merged_file_resume_on_any_world_size(runs, whole, source, ranks):
    resumed = runs.nnscaler(f"{source}-{ranks}", ranks, f"--resume_from={runs.folder / source}")
    assert_close(resumed, after(whole, 5))
    assert (source, ranks) != ("half", 2) or resumed == after(whole, 5)


def test_resume_from_last_continues_in_the_same_folder_on_fewer_ranks(runs):
    log, last = runs.folder / "again" / "log" / "metrics.jsonl", runs.folder / "again" / "ckpt" / "last"
    runs.nnscaler("again", 2, "--max_train_steps=3")
    before = log.read_text()
    runs.nnscaler("again", 1, "--resume_from=last", "--max_train_steps=5", "--lr_scheduler=constant")
    assert log.read_text().startswith(before)
    assert list(rows(log.parent, "train_loss")) == [1, 2, 3, 4, 5]
    assert [path.resolve().parent.name for path in last.iterdir()] == ["0000-0005"]


def test_exported_weights_move_both_ways(runs, whole):
    """Our engine evaluates nnScaler's weights as nnScaler did; both engines start from the export."""
    hf = runs.folder / "hf"
    python("train.py", *runs.argv("whole", f"--export_hf={runs.folder / 'half'}", f"--output_path={hf}"))
    said = python("train.py", *runs.argv("whole", "--evaluate", f"--model_id={hf}")).stdout.splitlines()[-1]
    saved = rows(runs.folder / "whole" / "log", "val_loss")[5]["val_loss"]
    assert abs(float(said.split("=")[1].split()[0]) - saved) < 1e-4
    start = [f"--model_id={hf}", "--max_train_steps=2"]
    assert_close(runs.nnscaler("from-hf", 1, *start), runs.native("from-hf-native", 1, *start))


def test_bf16_keeps_rope_frequencies_and_master_weights_in_fp32(runs):
    script = runs.folder / "dtypes.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from cli.config import parse
from trainer import ranks
def check(run):
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    assert {{value.dtype for value in run.model.parameters()}} == {{torch.bfloat16}}
    assert {{value.dtype for value in (*run.model.buffers(), *moments)}} == {{torch.float32}}
    print(len(moments), "checked")
with ranks.process_group():
    trainer, _ = train.build_trainer(parse())
    trainer.args.hook.on_train_end = check
    trainer.run()
""")
    flags = runs.argv("bf16", "--engine=nnscaler", "--precision=bf16", "--max_train_steps=2")
    assert "checked" in runs.start(1, ON_CPU, script, *flags)


def test_a_fresh_run_sets_the_old_one_aside_and_an_epochs_end_is_saved(runs):
    for _ in range(2):
        runs.nnscaler("aside", 2, "--micro_batch_size=4", "--global_batch_size=64", "--max_train_steps=5")
    assert list(rows(runs.folder / "aside" / "log", "train_loss")) == [1, 2, 3, 4, 5]
    assert (runs.folder / "aside" / "ckpt.1" / "last" / "0.ckpt").exists()
    saved = {path.name for path in (runs.folder / "aside" / "ckpt").glob("*-*")}
    assert saved == {"0000-0004", "0000-0005"}  # 218 samples: the fourth batch of 64 ends the first epoch


def test_sigterm_saves_and_leaves(runs):
    flags = runs.argv("killed", "--engine=nnscaler", "--max_train_steps=100000", "--lr_scheduler=constant")
    command = [sys.executable, str(ON_CPU), str(ROOT / "train.py"), *flags]  # without torchrun
    process = subprocess.Popen(command, cwd=runs.folder, env=environment(), stderr=subprocess.PIPE, text=True)
    log = runs.folder / "killed" / "log" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said[-3000:]
    state = json.loads(next((runs.folder / "killed" / "ckpt").glob("*-*/state.json")).read_text())
    assert state["step"] == max(rows(log.parent, "train_loss"))


def test_what_nnscaler_cannot_do_is_refused_in_a_sentence(runs, whole):
    runs.native("ours", 1, "--max_train_steps=1")
    torch.save({"model": print}, runs.folder / "evil.ckpt")
    theirs = f"--resume_from={runs.folder / 'half'}"
    cases = {
        ("nnscaler", "--compile=on"): "does not support --compile=on",
        ("nnscaler", "--async_save=on"): "does not support --async_save=on",
        ("nnscaler", "--recompute=1"): "does not support --recompute=1",
        ("nnscaler", "--recompute=full"): "does not support --recompute=full with --pas_policy=dp",
        ("nnscaler", "--plan_ngpus=2"): "plan_ngpus 2 does not divide 1 ranks",
        ("nnscaler", f"--resume_from={runs.folder / 'evil.ckpt'}"): "is no merged checkpoint",
        ("nnscaler", f"--resume_from={runs.folder / 'ours' / 'ckpt' / 'last'}"): "the other engine wrote",
        ("nnscaler", theirs, f"--save_dir={runs.folder / 'ours' / 'ckpt'}"): "which is our engine's",
        ("native", theirs): "the other engine wrote",
    }
    for (engine, *more), sentence in cases.items():
        done = python(
            ON_CPU, "train.py", *runs.argv("refused", f"--engine={engine}", *more), check=False, real=True
        )
        assert done.returncode == 2 and sentence in done.stderr, done.stderr[-2000:]
