"""README and docs cannot rot: their commands run, their flags, targets and files exist."""

import re
import shlex
from pathlib import Path

import docutils.core
import pytest
from helpers.corpora import small_tokenizer, write_jsonl
from helpers.runs import ROOT, make_model, make_text, python

from cli.config import FLAGS, parse

PAGES = [ROOT / "README.rst", ROOT / "CONTRIBUTING.rst", *sorted((ROOT / "docs").glob("*.rst"))]
LONGEST_README = 200  # lines
# Flags of torchrun, of the benchmarks and of other programs.
FOREIGN = "nproc_per_node local-addr nnodes rdzv-backend rdzv-endpoint shutdown_timeout max_restarts no-deps"
FOREIGN += " minutes device litgpt logdir demo mini help"
SCALE = 50  # a documented run has this many times more steps than its stand-in
TINY = dict(max_seq_len=64, micro_batch_size=1, global_batch_size=4, precision="fp32")


def commands(page: Path) -> list[str]:
    """The commands in the literal blocks of a page, without their comments."""
    lines = re.findall(r"^    (?:\$ )?((?:python|torchrun|make|pip|sbatch) .*)$", page.read_text(), re.M)
    whole = (line for line in lines if not line.endswith("\\"))
    return [shlex.join(shlex.split(line, comments=True)) for line in whole]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_target_and_file_that_a_page_names_exists(page):
    text = page.read_text()
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text))
    assert not named - FLAGS.keys() - set(FOREIGN.split())
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |``)make ([a-z-]+)", text, re.M)) <= targets
    paths = re.findall(r"``((?:tests|docs|tools|cli|llama3|trainer|benchmarks|images)/[\w./]+)``", text)
    paths += re.findall(r"<(docs/[\w.]+)>|:: (images/\S+)", text)
    for name in (part for path in paths for part in ([path] if isinstance(path, str) else path) if part):
        assert (ROOT / name).exists() or name == "benchmarks/gpu.json", name
    for command in commands(page):
        if command.split()[:2] == ["python", "train.py"] and "--config" not in command:
            parse(shlex.split(command)[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docutils_has_nothing_to_say(page):
    settings = dict(report_level=2, halt_level=2, input_encoding="utf-8")
    docutils.core.publish_string(page.read_text(), str(page), writer="html", settings_overrides=settings)


def test_the_readme_is_short():
    assert len((ROOT / "README.rst").read_text().splitlines()) <= LONGEST_README


def stand_in(command: str, model: Path) -> tuple[list[str], int | None]:
    """Return the script and flags for a tiny model, little text and few steps, and two ranks or None.

    The last of equal flags wins.
    """
    steps = re.search(r"--max_train_steps=(\d+)", command)
    launcher, *words = shlex.split(command)
    words = [str(ROOT / "train.py"), *words[words.index("train.py") + 1 :]]
    tiny = {"model_id": model, "max_train_steps": int(steps[1]) // SCALE if steps else 1000 // SCALE, **TINY}
    if "--config" in command and not steps:
        tiny["max_train_steps"] = 100 // SCALE
    if "--plan" in command:
        tiny["global_batch_size"] = 64
    if "--verify_resume" in command:
        tiny |= dict(world_size=2, max_train_steps=8)
    if not {"--dataset_id", "--config", "--resume_from"} & {word.split("=")[0] for word in words}:
        tiny["dataset_id"] = "texts/"
    words += [f"--{name}={value}" for name, value in tiny.items()]
    return words, 2 if launcher == "torchrun" else None


def runnable(page: Path) -> list[str]:
    others = ("sbatch", "--engine=nnscaler")  # what needs more than this machine has
    return [
        line for line in commands(page) if "train.py" in line and not any(word in line for word in others)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [*filter(runnable, PAGES)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    model = make_model(tmp_path / "model")
    small_tokenizer().save_pretrained(model)  # which has a chat template
    (tmp_path / "texts").mkdir()
    make_text(tmp_path / "texts" / "text.jsonl", documents=400)
    turns = [dict(role="user", content="the state"), dict(role="assistant", content="of the union")]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns} for _ in range(300)])
    yaml = re.search(r"^    model_id: .*?\n\n", page.read_text(), re.M | re.S)
    if yaml:
        (tmp_path / "run.yaml").write_text(re.sub("^    ", "", yaml[0], flags=re.M))
    for command in ["python train.py --prepare_data", *runnable(page)]:
        argv, ranks = stand_in(command, model)
        options = dict(cwd=tmp_path, input="the state\n", real=page.name == "README.rst")
        done = python(*argv, ranks=ranks, check=False, **options)
        healthy = done.returncode == 0 or "--doctor" in command  # which may find a fault on this machine
        assert healthy and "Traceback" not in done.stderr, f"{command}\n{done.stdout}\n{done.stderr[-4000:]}"
