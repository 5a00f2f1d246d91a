"""Wrong input is one message that says what came, what is needed and the fix, and exit code 2."""

import json
import shutil

import pytest
from helpers.runs import outputs, python, torchrun

import train

# name: (flags beside the good ones, what the message must contain)
WRONG = {
    "not prepared": ("--dataset_path=nowhere", "nowhere, python train.py --prepare_data"),
    "another sequence length": ("--max_seq_len=64", "32, --max_seq_len"),
    "less data than a global batch": ("--global_batch_size=4096", "4096, --global_batch_size"),
    "unknown model folder": ("--model_id=./no-such-model", "no-such-model"),
    "indivisible sizes": ("--micro_batch_size=3 --global_batch_size=8", "3, 8, divide, micro_batch_size"),
    "batch sizes that contradict": ("--grad_accumulation_steps=3 --global_batch_size=8", "3, 8"),
    "resume path that is not there": ("--resume_from=./gone", "gone, train first, a merged file"),
    "resume from a file that is no checkpoint": ("--resume_from=train.py", "train.py"),
    "no checkpoint to merge": ("--merge_checkpoint=./gone", "gone, train first"),
    "no checkpoint to export": ("--export_hf=./gone", "gone, train first"),
    "no checkpoint to evaluate": ("--evaluate --resume_from=last --save_dir=none", "no such checkpoint"),
    "two modes": ("--prepare_data --evaluate", "--prepare_data, --evaluate, not allowed"),
    "two presets": ("--mini --demo", "--mini, --demo, not allowed"),
    "no steps": ("--max_train_steps=0", "--max_train_steps 0, at least 1"),
    "negative learning rate": ("--learning_rate=-1", "--learning_rate -1.0, at least 0"),
    "all data for validation": ("--validation_fraction=1", "--validation_fraction 1.0, below 1"),
    "recompute of nothing known": ("--recompute=some", "--recompute some, full"),
    "all at once": ("--max_train_steps=0 --seed=-1 --recompute=x", "--max_train_steps, --seed, --recompute"),
    "a folder that cannot be written": ("--save_dir=train.py/ckpt", "train.py/ckpt, cannot be written"),
    "misspelt flag": ("--learning_rte=1", "--learning_rte"),
}


@pytest.fixture
def refused(flags, capsys):
    """Calls main, which must return 2; returns what it says: a line for each wrong flag at most."""

    def call(*wrong):
        assert train.main([*flags, *wrong]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return call


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_a_sentence_with_the_fix(refused, case):
    wrong, words = WRONG[case]
    said = refused(*wrong.split())
    assert all(word in said for word in words.split(", ")), said
    assert said.count("\n") <= len(wrong.split()), "more than one line for each flag"


def test_a_fresh_run_does_not_set_aside_what_it_reads(refused, tiny, tmp_path):
    (tmp_path / "ckpt" / "last").mkdir(parents=True)
    model = shutil.copytree(tiny, tmp_path / "ckpt" / "hf")
    said = refused(f"--model_id={model}", *outputs(tmp_path))
    assert "would be set aside" in said and model.exists()


@pytest.mark.parametrize("size, word", [("vocab_size", "--tokenizer_id"), ("intermediate_size", "has shape")])
def test_data_or_weights_that_do_not_fit_the_model_are_refused(refused, tmp_path, tiny, size, word):
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {size: 96}))
    assert word in refused(f"--model_id={other}", *outputs(tmp_path))


def test_a_gated_model_without_a_token_names_variable_page_and_demo(prepared, tmp_path):
    run, env = [f"--dataset_path={prepared}", "--max_seq_len=32"], dict(HF_TOKEN="", HF_HOME=str(tmp_path))
    done = python("train.py", *run, check=False, **env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    page = "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct"
    assert all(word in done.stderr for word in ("HF_TOKEN", page, "--demo"))


@pytest.mark.parametrize("wrong, said", [("--dataset_path=x", "x is not"), ("--prepare_data", "with python")])
def test_under_torchrun_one_clear_message_before_ranks_meet(flags, wrong, said):
    done = torchrun(2, "train.py", *flags, wrong, check=False)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count(said) == 1 and "init_process_group" not in done.stderr


def test_a_missing_last_is_a_warning_and_a_fresh_start(flags, tmp_path, caplog):
    assert train.main([*flags, "--resume_from=last", "--max_train_steps=1", *outputs(tmp_path)]) == 0
    assert "there is no 'last' checkpoint" in caplog.text and (tmp_path / "ckpt" / "last").exists()


def test_an_explicit_flag_beside_a_preset_wins():
    args = train.parse_args(["--demo", "--max_seq_len=128", "--learning_rate=1e-3"])
    assert (args.max_seq_len, args.learning_rate, args.model_id) == (128, 1e-3, "smollm2-135m")
    mini = train.parse_args(["--mini", "--num_hidden_layers=2"])
    assert (mini.from_scratch, mini.num_hidden_layers, mini.max_seq_len) == (True, 2, 4096)
    assert mini.dataset_path == "./bookcorpus-4096" and mini.tokenizer_id == "llama3"


def test_an_explicit_batch_flag_wins_over_checkpoint_and_demo():
    def sizes(*flags, resumed=None):
        return train.batch_sizes(train.parse_args(flags), resumed)

    assert sizes("--demo") == {"global_batch_size": train.presets.DEMO["global_batch_size"]}
    assert sizes("--demo", "--grad_accumulation_steps=3") == {"grad_accumulation_steps": 3}
    assert sizes(resumed={"global_batch_size": 64}) == {"global_batch_size": 64}
    assert sizes("--global_batch_size=16", resumed={"global_batch_size": 64}) == {"global_batch_size": 16}
