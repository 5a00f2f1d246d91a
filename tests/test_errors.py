"""Wrong input is one message that says what came, what is needed and the fix, and exit code 2."""

import json
import shutil

import pytest
from helpers.runs import python, torchrun

import train


def messages(capsys, *argv):
    """What main says, and its exit code, without starting a process."""
    code = train.main([str(argument) for argument in argv])
    return code, capsys.readouterr().err


# name: (flags beside the good ones, what the message must contain)
WRONG = {
    "not prepared": (["--dataset_path=nowhere"], ["nowhere", "python train.py --prepare_data"]),
    "another sequence length": (["--max_seq_len=64"], ["32", "--max_seq_len"]),
    "less data than a global batch": (["--global_batch_size=4096"], ["4096", "--global_batch_size"]),
    "unknown model folder": (["--model_id=./no-such-model"], ["no-such-model"]),
    "batch sizes that do not divide": (
        ["--micro_batch_size=3", "--global_batch_size=8"],
        ["3", "8", "divide", "micro_batch_size"],
    ),
    "batch sizes that contradict": (["--grad_accumulation_steps=3", "--global_batch_size=8"], ["3", "8"]),
    "resume path that is not there": (["--resume_from=./gone"], ["gone", "train first", "a merged file"]),
    "resume from a file that is no checkpoint": (["--resume_from=train.py"], ["train.py"]),
    "no checkpoint to merge": (["--merge_checkpoint=./gone"], ["gone", "train first"]),
    "no checkpoint to export": (["--export_hf=./gone"], ["gone", "train first"]),
    "two modes": (["--prepare_data", "--evaluate"], ["--prepare_data", "--evaluate", "not allowed"]),
    "two presets": (["--mini", "--demo"], ["--mini", "--demo", "not allowed"]),
    "no steps": (["--max_train_steps=0"], ["--max_train_steps 0", "at least 1"]),
    "negative learning rate": (["--learning_rate=-1"], ["--learning_rate -1.0", "at least 0"]),
    "all data for validation": (["--validation_fraction=1"], ["--validation_fraction 1.0", "below 1"]),
    "recompute of nothing known": (["--recompute=some"], ["--recompute some", "full"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_sentence_with_the_fix(flags, capsys, case):
    wrong, words = WRONG[case]
    code, said = messages(capsys, *flags, *wrong)
    assert code == 2 and "Traceback" not in said
    assert all(word in said for word in words), said


def test_evaluating_a_checkpoint_that_is_not_there_is_refused(flags, tmp_path, capsys):
    code, said = messages(capsys, *flags, "--evaluate", "--resume_from=last", f"--save_dir={tmp_path}")
    assert code == 2 and "no such checkpoint" in said


def test_a_fresh_run_does_not_set_aside_what_it_reads(flags, tiny, tmp_path, capsys):
    (tmp_path / "ckpt" / "last").mkdir(parents=True)
    model = shutil.copytree(tiny, tmp_path / "ckpt" / "hf")
    code, said = messages(
        capsys, *flags, f"--model_id={model}", f"--save_dir={tmp_path / 'ckpt'}", "--global_batch_size=4"
    )
    assert code == 2 and "would be set aside" in said and model.exists()


def test_all_wrong_values_are_said_at_once(flags, capsys):
    _, said = messages(capsys, *flags, "--max_train_steps=0", "--seed=-1", "--recompute=some")
    assert all(word in said for word in ("--max_train_steps", "--seed", "--recompute"))


def test_a_misspelt_flag_is_refused(flags, capsys):
    code, said = messages(capsys, *flags, "--learning_rte=1")
    assert code == 2 and "--learning_rte" in said and said.count("\n") == 1


def test_tokens_beyond_the_models_vocabulary_are_refused(flags, prepared, tmp_path, tiny, capsys):
    small = shutil.copytree(tiny, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    code, said = messages(capsys, *flags, f"--model_id={small}")
    assert code == 2 and "vocabulary" in said and "--tokenizer_id" in said


def test_weights_of_another_shape_are_refused(flags, tmp_path, tiny):
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    done = python("train.py", *flags, f"--model_id={other}", "--global_batch_size=4", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "has shape" in done.stderr


def test_a_gated_model_without_a_token_names_variable_page_and_demo(prepared, tmp_path):
    done = python(
        "train.py",
        f"--dataset_path={prepared}",
        "--max_seq_len=32",
        check=False,
        HF_TOKEN="",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(
        w in done.stderr
        for w in ("HF_TOKEN", "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct", "--demo")
    )


def test_under_torchrun_one_clear_message_before_ranks_meet(flags):
    done = torchrun(2, "train.py", *flags, "--dataset_path=nowhere", check=False)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("nowhere is not prepared") == 1
    assert "init_process_group" not in done.stderr


def test_preparing_under_torchrun_is_refused(flags):
    done = torchrun(2, "train.py", *flags, "--prepare_data", check=False)
    assert done.returncode == 1 and done.stderr.count("start it with python instead of torchrun") == 1


def test_a_missing_last_is_a_warning_and_a_fresh_start(flags, tmp_path):
    done = python("train.py", *flags, "--resume_from=last", "--max_train_steps=1", "--global_batch_size=4",
                  f"--save_dir={tmp_path / 'ckpt'}", f"--log_dir={tmp_path / 'log'}")  # fmt: skip
    assert "there is no 'last' checkpoint" in done.stderr and (tmp_path / "ckpt" / "last").exists()


def test_an_explicit_flag_beside_a_preset_wins():
    args = train.parse_args(["--demo", "--max_seq_len=128", "--learning_rate=1e-3"])
    assert (args.max_seq_len, args.learning_rate, args.model_id) == (128, 1e-3, "smollm2-135m")
    mini = train.parse_args(["--mini", "--num_hidden_layers=2"])
    assert (mini.from_scratch, mini.num_hidden_layers, mini.max_seq_len) == (True, 2, 4096)
    assert mini.dataset_path == "./bookcorpus-4096" and mini.tokenizer_id == "llama3"


def test_an_explicit_batch_flag_beside_the_demo_wins():
    assert train.batch_sizes(train.parse_args(["--demo"]), None) == {
        "global_batch_size": train.presets.DEMO["global_batch_size"]
    }
    assert train.batch_sizes(train.parse_args(["--demo", "--grad_accumulation_steps=3"]), None) == {
        "grad_accumulation_steps": 3
    }
    assert train.batch_sizes(train.parse_args([]), {"global_batch_size": 64}) == {"global_batch_size": 64}
    assert train.batch_sizes(train.parse_args(["--global_batch_size=16"]), {"global_batch_size": 64}) == {
        "global_batch_size": 16
    }
