"""The house: which room may know which, what a reader meets first, and how much of it there is."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import ROOT, environment

ROOMS = ("cli", "llama3", "trainer", "tools")
PRODUCT = [
    ROOT / "train.py",
    ROOT / "errors.py",
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))),
]
# Inside trainer, a layer knows nothing of those after it.
TRAINER_LAYERS = (
    {"args", "ending", "sampler", "tensorfile", "devices"},
    {"checkpoint", "planner", "measure", "parallel"},
    {"folders", "ranks"},
    {"saver", "loggers", "setup"},
    {"trainer"},
    {"nnscaler_engine"},
    {"engine"},
)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ["llama3", "trainer", "tools"])
def test_no_arrow_leads_back_or_across(room):
    others = {"train", "cli"} if room == "tools" else {"train", *ROOMS} - {room}
    for path in (ROOT / room).rglob("*.py"):
        crossing = {name for name in imports(path) if name.split(".")[0] in others}
        assert not crossing, f"{path.name} imports {crossing}"


def test_inside_trainer_arrows_lead_down():
    level = {name: index for index, layer in enumerate(TRAINER_LAYERS) for name in layer}
    for path in (ROOT / "trainer").rglob("*.py"):
        room = path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")
        for name in imports(path) if room != "__init__" else ():
            if name.startswith("trainer.") and (target := name.split(".")[1]) in level:
                assert level[target] <= level[room], f"{path.name} imports {target}"


def test_help_answers_at_once():
    def seconds():
        began = time.perf_counter()
        command = [sys.executable, "train.py", "--help"]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
        return time.perf_counter() - began

    probe = (
        "import sys, train; print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", probe]
    loaded = subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    assert min(seconds() for _ in range(3)) < 0.5


def test_every_module_says_its_job_in_a_line():
    for path in PRODUCT:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring and len((docstring + "\n\n").split("\n\n")[0].splitlines()) == 1, path


def test_functions_have_at_most_fifty_lines():
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 50, f"{path.name}: {node.name} is too long"


def test_nothing_reads_pickles_or_runs_remote_code():
    for path in PRODUCT:
        text = path.read_text()
        assert "import pickle" not in text and "trust_remote_code=True" not in text
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path.name}: {line}"
