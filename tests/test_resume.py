"""A resume takes what its run was, names what differs, replaces nothing, and refuses what cannot be."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from helpers.runs import make_text, outputs, prepare, python, rows, start
from transformers import AutoTokenizer

import train
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.trainer import Trainer


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A run of four steps, saved after each."""
    out = tmp_path_factory.mktemp("finished")
    saves = ["--save_every_n_train_steps=1", "--max_train_steps=4", "--weight_decay=0.1"]
    assert train.main([*flags, *saves, *outputs(out)]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.fixture
def refused(capsys):
    def call(*argv):
        assert train.main([*map(str, argv)]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return call


def saved(save_dir: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in checkpoint.checkpoints(save_dir))


def state(path: Path) -> dict:
    return Checkpoint.open(path).state


def test_a_resume_takes_the_flags_of_its_run_and_names_what_differs(run, caplog):
    caplog.set_level("INFO")
    more = ["--resume_from=last", "--max_train_steps=5", "--weight_decay=0.2"]
    assert train.main([*more, *outputs(run)]) == 0
    config = state(run / "ckpt" / "last")["config"]
    before = state(run / "ckpt" / "0000-0004")["config"]
    changed = {name for name in before if before[name] != config[name]}
    assert changed == {"weight_decay", "max_train_steps", "save_dir", "log_dir", "resume_from"}
    assert config["weight_decay"] == 0.2
    assert rows(run / "log", "lr")[5]["lr"] == 1e-3  # the run's, not the default
    assert "--weight_decay=0.2, the checkpoint's run had 0.1" in caplog.text
    assert "--learning_rate=0.001, as the checkpoint's run (without it: 2e-05)" in caplog.text
    assert "--max_train_steps=5, the checkpoint's run had 4" in caplog.text


def test_evaluate_takes_the_model_and_data_of_the_checkpoint(run, tiny, prepared, capsys):
    assert train.main(["--evaluate", "--resume_from=last", *outputs(run)]) == 0
    loss = rows(run / "log", "val_loss")[4]["val_loss"]
    tokenizer, targets, text = AutoTokenizer.from_pretrained(tiny), 0, ""
    for row in datasets.load_from_disk(str(prepared))["validation"]:
        learned = [i for n, i in enumerate(row["input_ids"]) if n and n not in row["document_starts"]]
        targets, text = targets + len(learned), text + tokenizer.decode(learned, skip_special_tokens=True)
    bits = loss * targets / math.log(2) / len(text.encode())
    last = f"val_loss={loss:.6f} perplexity={math.exp(loss):.6f}"
    assert capsys.readouterr().out.splitlines()[-2:] == [f"bits_per_byte={bits:.6f}", last]


def test_evaluate_says_why_there_are_no_bits_per_byte(run, prepared, tmp_path, caplog, capsys):
    copy = Path(shutil.copytree(prepared, tmp_path / "data"))
    known = json.loads((copy / "preparation.json").read_text()) | dict(tokenizer_id=str(tmp_path / "gone"))
    (copy / "preparation.json").write_text(json.dumps(known))
    flags = ["--evaluate", "--resume_from=last", f"--dataset_path={copy}", *outputs(run)]
    assert train.main(flags) == 0
    assert "no bits per byte" in caplog.text and "gone" in caplog.text
    assert capsys.readouterr().out.splitlines()[-1].startswith("val_loss=")


def test_other_content_at_the_same_path_is_refused_or_allowed(flags, tiny, refused, tmp_path, caplog):
    text = make_text(tmp_path / "text.jsonl", documents=60, seed=5)
    data = prepare(tiny, text, validation_fraction=0.2)
    assert train.main([*flags, f"--dataset_path={data}", *outputs(tmp_path), "--max_train_steps=1"]) == 0
    shutil.rmtree(data)
    prepare(tiny, make_text(text, documents=70, seed=6), validation_fraction=0.2)
    more = ["--resume_from=last", "--max_train_steps=2", *outputs(tmp_path)]
    assert "--allow_changed_data" in refused(*more)
    assert train.main([*more, "--allow_changed_data"]) == 0 and "holds other data" in caplog.text


def test_a_branch_sets_aside_what_it_would_replace(run, caplog):
    metrics = (run / "log" / "metrics.jsonl").read_text()
    weights = dict(Checkpoint.open(run / "ckpt" / "0000-0003").parameters())
    older = f"--resume_from={run / 'ckpt' / '0000-0002'}"
    assert train.main([older, "--max_train_steps=3", "--learning_rate=0.5", *outputs(run)]) == 0
    assert saved(run / "ckpt") == [1, 2, 3] and saved(run / "ckpt.1") == [3, 4]
    assert (run / "log.1" / "metrics.jsonl").read_text() == metrics
    assert list(rows(run / "log", "lr")) == [1, 2, 3]
    assert caplog.text.count("set aside in") == 2
    kept = dict(Checkpoint.open(run / "ckpt.1" / "0000-0003").parameters())
    assert all(kept[name].equal(weights[name]) for name in weights)
    first, second = state(run / "ckpt.1" / "0000-0003"), state(run / "ckpt" / "0000-0003")
    assert second["parents"] == [[first["run"], 2]] and second["run"] != first["run"]
    assert checkpoint.descends_from(second, state(run / "ckpt" / "0000-0002"))
    assert not checkpoint.descends_from(second, first)


def test_pruning_and_falling_back_never_cross_runs(run, flags, tmp_path):
    other = tmp_path / "other"
    assert train.main([*flags, "--max_train_steps=2", "--seed=3", *outputs(other)]) == 0
    assert train.main(["--merge_checkpoint", *outputs(other)]) == 0
    more = ["--max_train_steps=3", "--keep_last_n_checkpoints=1", "--save_every_n_train_steps=1"]
    metrics = (run / "log" / "metrics.jsonl").read_text()
    assert train.main([f"--resume_from={other / 'ckpt' / 'merged.ckpt'}", *more, *outputs(run)]) == 0
    assert saved(run / "ckpt") == [3] and saved(run / "ckpt.1") == [1, 2, 3, 4]
    assert (run / "log.1" / "metrics.jsonl").read_text() == metrics
    for shard in (run / "ckpt" / "0000-0003").glob("*.safetensors"):
        shard.unlink()
    assert train.main(["--resume_from=last", "--max_train_steps=4", *outputs(run)]) == 2


def test_a_merged_file_of_the_folder_continues_it(run):
    assert train.main(["--merge_checkpoint", *outputs(run)]) == 0
    merged = f"--resume_from={run / 'ckpt' / 'merged.ckpt'}"
    assert train.main([merged, "--max_train_steps=5", *outputs(run)]) == 0
    assert saved(run / "ckpt") == [1, 2, 3, 4, 5] and not (run / "ckpt.1").exists()
    assert list(rows(run / "log", "lr")) == [1, 2, 3, 4, 5] and not (run / "log.1").exists()


def test_a_merged_file_is_a_file_still_after_it_was_resumed(run):
    assert train.main(["--merge_checkpoint", *outputs(run)]) == 0
    shutil.rmtree(run / "ckpt" / "0000-0004")
    merged = run / "ckpt" / "merged.ckpt"
    for steps in (5, 6):
        assert train.main([f"--resume_from={merged}", f"--max_train_steps={steps}", *outputs(run)]) == 0
        assert merged.is_file() and saved(run / "ckpt") == [1, 2, 3, *range(5, steps + 1)]


@pytest.mark.parametrize("which", ["last", "best"])
def test_real_folders_in_the_place_of_links_count(finished, refused, tmp_path, which, caplog):
    caplog.set_level("INFO")
    run = shutil.copytree(finished, tmp_path / "run")  # follows the links, as `cp -rL` does
    assert not (run / "ckpt" / which).is_symlink()
    for path in [*run.glob("ckpt/000*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train.main([f"--resume_from={which}", "--max_train_steps=5", *outputs(run)]) == 0
    assert "step 4, 16 samples seen" in caplog.text
    assert saved(run / "ckpt") == [4, 5] and (run / "ckpt" / "last").readlink() == Path("0000-0005")


def test_weights_that_no_step_succeeded_from_are_not_called_good(run, flags, capsys):
    broken = ["--resume_from=last", "--learning_rate=1e30", "--clip_gnorm=0", "--max_train_steps=20"]
    broken += ["--max_skipped_steps=1", "--keep_last_n_checkpoints=1", *outputs(run)]
    assert train.main(broken) == 1
    assert "the last good checkpoint is" in capsys.readouterr().err
    last = run / "ckpt" / "last"
    assert last.readlink() == Path("0000-0004")  # step 5 was saved, and no step succeeded from it
    last.unlink()
    last.symlink_to("0000-0005")  # as if the process had been killed before it could tell
    assert train.main(broken) == 1
    assert f"the last good checkpoint is {run / 'ckpt' / '0000-0004'}" in capsys.readouterr().err
    assert last.readlink() == Path("0000-0004")
    mended = ["--resume_from=last", "--learning_rate=1e-3", "--max_train_steps=5"]
    assert train.main([*mended, *outputs(run)]) == 0
    assert all(math.isfinite(row["train_loss"]) for row in rows(run / "log", "train_loss").values())


def test_the_last_checkpoint_of_a_run_is_not_called_good_either(run, capsys):
    more = ["--resume_from=last", "--learning_rate=1e30", "--clip_gnorm=0", *outputs(run)]
    assert train.main([*more, "--max_train_steps=5"]) == 0  # no step has succeeded from its result
    assert train.main([*more, "--max_train_steps=9"]) == 1
    assert f"the last good checkpoint is {run / 'ckpt' / '0000-0004'}" in capsys.readouterr().err
    assert (run / "ckpt" / "last").readlink() == Path("0000-0004")


def test_a_kill_while_a_branch_is_set_aside_loses_nothing(run):
    metrics = (run / "log" / "metrics.jsonl").read_text()
    branch = [f"--resume_from={run / 'ckpt' / '0000-0002'}", "--max_train_steps=3", *outputs(run)]
    code = "import os, sys, train, trainer.folders as f; f.make_room = lambda *_: os._exit(9); "
    killed = python("-c", code + "train.main(sys.argv[1:])", *branch, check=False)
    assert killed.returncode == 9  # after the metrics, before the rest
    assert saved(run / "ckpt") == [1, 2, 3, 4] and (run / "log.1" / "metrics.jsonl").read_text() == metrics
    assert train.main(branch) == 0 and saved(run / "ckpt.1") == [3, 4]


def test_a_run_that_ends_while_another_starts_is_not_overwritten(run, monkeypatch, refused):
    def slow(*args, real=train.build_trainer):
        built = real(*args)
        shutil.copytree(run / "ckpt" / "0000-0004", run / "ckpt" / "0000-0008")  # the other run saves
        return built

    monkeypatch.setattr("train.build_trainer", slow)
    said = refused("--resume_from=last", "--max_train_steps=9", *outputs(run))
    assert "another run saved to" in said and "Start again" in said


def test_a_signal_on_a_skipped_step_waits_for_the_next_good_one(run, monkeypatch, capsys):
    def step(self, batches, real=Trainer._train_step):
        result = real(self, batches)
        if self.state.step == 4:  # the next step, 5, is not finite, and the signals come in it
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            return replace(result, loss=math.nan, is_finite=False)
        return result

    monkeypatch.setattr(Trainer, "_train_step", step)
    with pytest.raises(SystemExit) as left:
        train.main(["--resume_from=last", "--max_train_steps=20", *outputs(run)])
    assert left.value.code == 143 and saved(run / "ckpt") == [1, 2, 3, 4, 6]


def test_last_does_not_name_a_last_step_that_was_skipped(run, monkeypatch, capsys):
    def step(self, batches, real=Trainer._train_step):
        return replace(real(self, batches), is_finite=self.state.step < 5)

    monkeypatch.setattr(Trainer, "_train_step", step)
    more = ["--max_train_steps=6", "--save_every_n_train_steps=10"]
    assert train.main(["--resume_from=last", *more, *outputs(run)]) == 1
    said = capsys.readouterr().err
    assert "0000-0006 holds what was before it" in said and "'last' does not name it" in said
    assert saved(run / "ckpt") == [1, 2, 3, 4, 6] and (run / "ckpt" / "last").readlink() == Path("0000-0004")


SAID = {
    "beyond the model's": ("--max_seq_len=160", "--max_seq_len=160, the model was made for 128"),
    "warmup beyond the run": ("--warmup_steps=9", "--warmup_steps=9, but the run ends at step 2"),
    "no validation set": ("--val_every_n_train_steps=1", "has no validation set"),
    "weights that are not used": ("--num_hidden_layers=2", "fresh weights, not those of --model_id="),
    "recompute beyond the layers": ("--recompute=9", "--recompute=9, the model has 3 layers"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_a_flag_cannot_do_is_said_once(flags, tiny, tmp_path, caplog, case):
    flag, expected = SAID[case]
    text = make_text(tmp_path / "text.jsonl", documents=60)
    length = flag if "seq" in flag else "--max_seq_len=32"
    data = [f"--dataset_path={tmp_path / 'data'}", f"--model_id={tiny}", length, "--validation_fraction=0"]
    assert train.main(["--prepare_data", f"--dataset_id={text}", *data]) == 0
    more = [*flags, *data[:-1], "--max_train_steps=2", flag, *outputs(tmp_path)]
    assert train.main(more) == 0 and caplog.text.count(expected) == 1


def test_two_merges_at_once_leave_one_whole_file(run, tmp_path):
    command = ["train.py", "--merge_checkpoint", *outputs(run)]
    both = [start(command, tmp_path / "stdout", tmp_path / "stderr") for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    Checkpoint.open(run / "ckpt" / "merged.ckpt").verify()
    assert not list((run / "ckpt").glob(".merged*"))


def test_a_killed_merge_leaves_nothing_that_the_next_does_not_remove(run):
    left = run / "ckpt" / f".merged.ckpt.{os.uname().nodename}-{2**22 + 1}.new"  # no process has that number
    left.touch()
    assert train.main(["--merge_checkpoint", *outputs(run)]) == 0 and not left.exists()
