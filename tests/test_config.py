"""--config gives flags by a YAML file, and the one that a run leaves repeats it to the last bit."""

import shlex
from pathlib import Path

import pytest
from helpers.runs import assert_same, outputs, rows

import train
from cli import flagfile, flags, report
from cli.flags import parse_args

RUN = ["--max_train_steps=3", "--val_every_n_train_steps=2"]


@pytest.fixture
def parsed(tmp_path):
    """The flags of a YAML text, with others of the command line."""

    def parse(text: str, *argv: str):
        (tmp_path / "run.yaml").write_text(text)
        return parse_args([f"--config={tmp_path / 'run.yaml'}", *argv])

    return parse


# What YAML would take for something else -> what the flag means.
VALUES = {
    "learning_rate: 2e-5": 2e-5,  # YAML's floats need a dot: this is text
    "device_type: 80:900:3000": "80:900:3000",  # a number to the base 60
    "compile: on": "on",  # true
    "async_save: off": "off",  # false
    "recompute: none": "none",
    "recompute: 3": "3",
    "clip_gnorm: 1": 1.0,
    "max_train_steps: 1_000": 1000,
    "deterministic: yes": True,
    "deterministic: No": False,
    "from_scratch: true": True,
    "model_id: ~/model": str(Path.home() / "model"),
    "text_column: null": None,
    "text_column:": None,
    'text_column: "null"': "null",
    "max_seq_len: ~": 8192,
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_means_what_it_would_on_the_command_line(parsed, text):
    assert getattr(parsed(text), text.partition(":")[0]) == VALUES[text]


def test_the_command_line_wins_over_the_file_and_the_file_over_preset_and_checkpoint(parsed):
    text = "mini: true\nmax_seq_len: 128\nlearning_rate: 1e-3\ndeterministic: false"
    args = parsed(text, "--learning_rate=1e-4")
    assert (args.max_seq_len, args.learning_rate, args.num_hidden_layers) == (128, 1e-4, 4)
    assert args.typed == {"config", "learning_rate"}
    demo = parsed(text, "--demo")
    assert demo.demo and demo.num_hidden_layers is None and demo.max_seq_len == 128
    saved = dict(max_seq_len=64, deterministic=True, seed=3, dataset_id="sotu", dataset_path="x")
    resumed = flags.resolve_resumed(args, {"config": saved})
    assert (resumed.max_seq_len, resumed.deterministic, resumed.seed) == (128, False, 3)
    assert not parsed("demo: false").demo and parsed("# nothing").max_seq_len == 8192


# The file -> what the message must contain.
WRONG = {
    "learning_rte: 1": "unknown flag learning_rte, did you mean --learning_rate?",
    "lr: 1": "did you mean --learning_rate?",
    "batch-size: 1": "did you mean --global_batch_size?",
    "dem: true": "did you mean --demo?",
    "config: other.yaml": "unknown flag config",
    "evaluate: true": "names a mode, give --evaluate on the command line",
    "max_train_steps: many": "argument --max_train_steps, invalid int value, 'many'",
    "max_train_steps: 1.5": "invalid int value, '1.5'",
    "max_train_steps: 0": "--max_train_steps 0, at least 1",
    "precision: fp16": "--precision, 'fp16', 'bf16', 'fp32'",
    "compile: true": "--compile, 'true', 'auto'",
    "from_scratch: maybe": "from_scratch is 'maybe', give true or false",
    "demo: true\nmini: true": "not allowed with",
    "lora_targets: [q_proj]": "line 1, more than one value, name: value",
    "max_seq_len: {a: 1}": "more than one value",
    "seed: 1\nseed: 2": "seed twice, leave one of them out",
    "- seed": "is no mapping, name: value",
    "seed": "is no mapping",
    "seed: [1": "is not YAML, name: value",
    "seed: 1\n---\nseed: 2": "is not YAML",
    "seed: caf\xe9": "is not YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_one_sentence_with_its_name_and_exit_code_2(tmp_path, capsys, text):
    (tmp_path / "run.yaml").write_text(text, "latin-1")
    assert train.main([f"--config={tmp_path / 'run.yaml'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("train.py: ")
    assert all(words in said for words in WRONG[text].split(", ")), said
    assert "run.yaml" in said or text == "max_train_steps: 0"


def test_a_missing_file_is_a_sentence(tmp_path, capsys):
    for name, reason in (("gone.yaml", "No such file"), ("", "Is a directory")):
        assert train.main([f"--config={tmp_path / name}"]) == 2
        assert reason in (said := capsys.readouterr().err) and "check the name" in said


@pytest.mark.parametrize(
    "argv", ["", "--demo", "--mini --seed=3", "--demo --lora_rank=2 --learning_rate=2e-7"]
)
def test_what_is_written_is_read_as_the_same_flags(tmp_path, argv):
    args = parse_args(argv.split())
    values = flags.repeatable(vars(args), args.demo)
    flagfile.write(tmp_path / "config.yaml", values)
    again = parse_args([f"--config={tmp_path / 'config.yaml'}"])
    for name in {*flags.FLAGS, "demo"} - {"config"}:
        assert getattr(again, name) == getattr(args, name), name
    assert not values.keys() & flags.NOT_REPEATED and [*tmp_path.iterdir()] == [tmp_path / "config.yaml"]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    assert train.main([*flags, *RUN, "--grad_accumulation_steps=4", *outputs(folder)]) == 0
    return folder


def test_the_file_beside_the_metrics_repeats_the_run_to_the_last_bit(run, tmp_path):
    text = (run / "log" / "config.yaml").read_text()
    assert text == (run / "ckpt" / "config.yaml").read_text()
    # The data's own share of validation, and no accumulation: on other ranks it follows from the batch.
    assert "validation_fraction: 0.2\n" in text and "accumulation" not in text
    assert train.main([f"--config={run / 'log' / 'config.yaml'}", *outputs(tmp_path)]) == 0
    assert_same(tmp_path, run)
    losses = [
        [row["val_loss"] for row in rows(folder / "log", "val_loss").values()] for folder in (run, tmp_path)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_an_adapters_run_is_repeated_too(flags, tmp_path):
    assert train.main([*flags, *RUN, "--lora_rank=2", *outputs(tmp_path / "one")]) == 0
    again = [f"--config={tmp_path / 'one' / 'ckpt' / 'config.yaml'}", *outputs(tmp_path / "two")]
    assert train.main(again) == 0
    assert_same(tmp_path / "two", tmp_path / "one")


def test_a_resume_updates_the_file_and_a_fresh_run_sets_it_aside_with_its_run(run, flags, tmp_path):
    assert train.main([*flags, *RUN, *outputs(tmp_path)]) == 0
    first = {name: (tmp_path / name / "config.yaml").read_text() for name in ("log", "ckpt")}
    more = ["--resume_from=last", "--max_train_steps=4", "--learning_rate=0.5", *outputs(tmp_path)]
    assert train.main(more) == 0
    for name, text in first.items():
        updated = (tmp_path / name / "config.yaml").read_text()
        assert updated != text and "max_train_steps: 4\n" in updated and "learning_rate: 0.5\n" in updated
        assert "resume_from" not in updated
    again = [f"--config={tmp_path / 'log' / 'config.yaml'}", "--max_train_steps=1"]
    assert train.main(again) == 0  # in the same folders
    for name in first:
        old, new = (tmp_path / folder / "config.yaml" for folder in (f"{name}.1", name))
        assert "max_train_steps: 4\n" in old.read_text() and "max_train_steps: 1\n" in new.read_text()
    assert (tmp_path / "log.1" / "metrics.jsonl").exists() and (tmp_path / "ckpt.1" / "0000-0004").exists()


def test_a_folder_with_somebodys_config_is_refused_and_stays(flags, tmp_path, capsys):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.yaml").write_text("mine")
    assert train.main([*flags, *RUN, *outputs(tmp_path)]) == 2
    assert "holds files that no run wrote" in capsys.readouterr().err
    assert (tmp_path / "ckpt" / "config.yaml").read_text() == "mine" and not (tmp_path / "log").exists()


def test_after_a_run_its_file_opens_its_checkpoint_and_not_its_model(run, caplog):
    caplog.set_level("INFO")
    argv = [f"--config={run / 'log' / 'config.yaml'}", "--generate=the people", "--max_new_tokens=4"]
    model = parse_args(argv).model_id
    for more, source in (([], run / "ckpt" / "last"), ([f"--model_id={model}"], model)):
        assert train.main([*argv, *more]) == 0
        assert f"model: {source}\n" in caplog.text


def test_the_next_commands_keep_what_was_typed_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 2e-4\nfrom_scratch: false\nsave_dir: there\n")
    args = parse_args([f"--config={file}", "--learning_rate=1e-4"])
    merge = parse_args(shlex.split(report.repeated(args, merge_checkpoint="there/last"))[2:])
    assert (merge.mode, merge.learning_rate, merge.save_dir) == ("merge_checkpoint", 1e-4, "there")
    # A resume takes the rate from the checkpoint: the file's must not win over it.
    assert parse_args(shlex.split(report.continuing(args))[2:]).given == dict(
        save_dir="there", resume_from="last"
    )
