"""--config gives flags by a YAML file, and the one that a run leaves repeats it to the last bit."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from helpers.runs import assert_same, outputs, rows

import train
from cli import config as cli_config
from cli import config_file, report, settings, suggestions
from cli.config import DEFAULTS, FLAGS, Command, Origin
from errors import UserError
from trainer.checkpoint import Checkpoint

RUN = ["--max_train_steps=3", "--val_every_n_train_steps=2"]


@pytest.fixture
def parsed(tmp_path):
    """Return a function that parses a YAML text, with flags of the command line."""

    def call(text: str, *argv: str) -> Command:
        (tmp_path / "run.yaml").write_text(text)
        return cli_config.parse([f"--config={tmp_path / 'run.yaml'}", *argv])

    return call


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
    assert getattr(parsed(text).config, text.partition(":")[0]) == VALUES[text]


def test_the_command_line_wins_over_the_file_and_the_file_over_preset_and_checkpoint(parsed):
    text = "mini: true\nmax_seq_len: 128\nlearning_rate: 1e-3\ndeterministic: false"
    command = parsed(text, "--learning_rate=1e-4")
    config = command.config
    assert (config.max_seq_len, config.learning_rate, config.num_hidden_layers) == (128, 1e-4, 4)
    expected = {
        "learning_rate": Origin.COMMAND_LINE,
        "max_seq_len": Origin.FILE,
        "num_hidden_layers": Origin.PRESET,
        "seed": Origin.DEFAULT,
    }
    assert {name: command.origins[name] for name in expected} == expected
    demo = parsed(text, "--demo").config
    assert demo.demo and not demo.mini and demo.num_hidden_layers is None and demo.max_seq_len == 128
    saved = dict(max_seq_len=64, deterministic=True, seed=3, dataset_id="sotu", dataset_path="x")
    resumed = command.resumed(saved)
    config = resumed.config
    assert (config.max_seq_len, config.deterministic, config.seed) == (128, False, 3)
    assert resumed.origins["seed"] == Origin.CHECKPOINT
    assert not parsed("demo: false").config.demo and parsed("# nothing").config.max_seq_len == 8192


def test_a_resume_takes_the_preset_and_compile_of_its_run_unless_they_are_given():
    saved = {
        "demo": True,
        "compile": "on",
        "save_dir": "elsewhere",
        "max_train_steps": 7,
        "recompute": "full",
    }
    resumed = cli_config.parse(["--resume_from=last"]).resumed(saved).config
    assert (resumed.demo, resumed.compile, resumed.max_val_samples) == (True, "on", 24)
    assert (resumed.save_dir, resumed.max_train_steps, resumed.recompute) == ("./checkpoints", 7, "auto")
    resumed = cli_config.parse(["--mini", "--compile=off"]).resumed(saved).config
    assert (resumed.demo, resumed.mini, resumed.compile) == (False, True, "off")


def test_config_and_its_origins_never_change():
    command = cli_config.parse(["--seed=3"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        command.config.seed = 4
    assert settings.resolve_precision(command, "fp32").config.precision == "fp32"
    assert command.config.precision == "auto"


# The file -> what the message must contain.
WRONG = {
    "learning_rte: 1": "unknown flag learning_rte, Use --learning_rate",
    "lr: 1": "Use --learning_rate",
    "batch-size: 1": "Use --global_batch_size",
    "deepspeed: x.json": "there is no flag deepspeed, FSDP2",
    "dem: true": "Use --demo",
    "config: other.yaml": "unknown flag config",
    "evaluate: true": "names the mode evaluate, Give --evaluate on the command line",
    "max_train_steps: many": "argument --max_train_steps, invalid int value, 'many'",
    "max_train_steps: 1.5": "invalid int value, '1.5'",
    "max_train_steps: 0": "--max_train_steps must be >= 1 (got 0)",
    "precision: fp16": "--precision, 'fp16', 'bf16', 'fp32'",
    "compile: true": "--compile, 'true', 'auto'",
    "from_scratch: maybe": "from_scratch is 'maybe', Give true or false",
    "demo: true\nmini: true": "not allowed with",
    "lora_targets: [q_proj]": "line 1, more than one value, name: value",
    "max_seq_len: {a: 1}": "more than one value",
    "seed: 1\nseed: 2": "seed twice, Leave one of them out",
    "- seed": "is not a mapping, name: value",
    "seed": "is not a mapping",
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
        assert reason in (said := capsys.readouterr().err) and "Check the name" in said


@pytest.mark.parametrize(
    "argv", ["", "--demo", "--mini --seed=3", "--demo --lora_rank=2 --learning_rate=2e-7"]
)
def test_what_is_written_is_read_as_the_same_flags(tmp_path, argv):
    config = cli_config.parse(argv.split()).config
    values = cli_config.repeatable(dataclasses.asdict(config))
    config_file.write(tmp_path / "config.yaml", values)
    again = cli_config.parse([f"--config={tmp_path / 'config.yaml'}"]).config
    assert dataclasses.replace(again, config=None) == config
    assert all(FLAGS[name].repeated for name in values)
    assert [*tmp_path.iterdir()] == [tmp_path / "config.yaml"]


@pytest.mark.slow
def test_a_run_of_the_demo_resumes_to_the_last_bit_without_the_flag(flags, tmp_path):
    demo = [*flags, "--demo", "--max_train_steps=4", "--save_every_n_train_steps=2"]
    assert train.main([*demo, *outputs(tmp_path / "whole")]) == 0
    middle = next((tmp_path / "whole" / "ckpt").glob("*-0002"))
    rest = [f"--resume_from={middle}", "--max_train_steps=4", *outputs(tmp_path / "rest")]
    assert train.main(rest) == 0
    assert_same(tmp_path / "rest", tmp_path / "whole", first_step=3)
    saved = Checkpoint.open(tmp_path / "rest" / "ckpt" / "last").state
    assert saved["config"]["demo"] is True
    assert saved["config"]["compile"] == "on" or not settings.can_compile()
    assert saved["layout"]["compile"] == (saved["config"]["compile"] == "on")


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
    assert "is not empty and was not made by a run" in capsys.readouterr().err
    assert (tmp_path / "ckpt" / "config.yaml").read_text() == "mine" and not (tmp_path / "log").exists()


def test_after_a_run_its_file_opens_its_checkpoint_and_not_its_model(run, caplog):
    caplog.set_level("INFO")
    argv = [f"--config={run / 'log' / 'config.yaml'}", "--generate=the people", "--max_new_tokens=4"]
    model = cli_config.parse(argv).config.model_id
    for more, source in (([], run / "ckpt" / "last"), ([f"--model_id={model}"], model)):
        assert train.main([*argv, *more]) == 0
        assert f"model: {source}, in " in caplog.text


def test_the_next_commands_keep_what_was_typed_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 2e-4\nfrom_scratch: false\nsave_dir: there\n")
    command = cli_config.parse([f"--config={file}", "--learning_rate=1e-4"])
    merge = cli_config.parse(shlex.split(report.repeated(command, merge_checkpoint="there/last"))[2:]).config
    assert (merge.mode, merge.learning_rate, merge.save_dir) == ("merge_checkpoint", 1e-4, "there")
    # A resume takes the rate from the checkpoint: the file's must not win over it.
    again = cli_config.parse(shlex.split(report.continuing(command))[2:])
    assert again.values_from(Origin.COMMAND_LINE) == dict(save_dir="there", resume_from="last")


def test_the_other_trainers_names_point_to_our_flags():
    assert len(suggestions.ALIASES) >= 60
    for name, target in suggestions.ALIASES.items():
        assert target in FLAGS and name not in FLAGS
        with pytest.raises(UserError, match=f"Use --{target}"):
            cli_config.parse([f"--{name}=1"])
        if "_" in name:
            with pytest.raises(UserError, match=f"Use --{target}"):
                cli_config.parse([f"--{name.replace('_', '-')}", "1"])
    for name, (reason, fix) in suggestions.LACKING.items():
        assert name not in FLAGS and name not in suggestions.ALIASES
        with pytest.raises(UserError) as caught:
            cli_config.parse([f"--{name}=1"])
        assert reason in caught.value.problem and caught.value.fix == fix
        assert all(flag in FLAGS for flag in re.findall(r"--(\w+)", fix)), fix


@pytest.mark.parametrize("name", ["xyz", "save", "gradients", "number"])
def test_a_name_that_is_close_to_no_flag_gets_no_suggestion(name):
    with pytest.raises(UserError) as caught:
        cli_config.parse([f"--{name}=1"])
    assert caught.value.fix == suggestions.HELP_FIX


def test_every_flag_has_a_help_a_group_and_a_default_of_its_type():
    for name, flag in FLAGS.items():
        assert flag.help and flag.group
        default = DEFAULTS[name]
        if default is not None:
            assert isinstance(default, cli_config.TYPES[name])
        if flag.least is not None and default is not None:
            assert default >= flag.least
