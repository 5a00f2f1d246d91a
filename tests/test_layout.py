"""The house: which room may know which, what a reader meets first, and how much of it there is."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.runs import ROOT, environment

ROOMS = ("llama3", "trainer", "tools")
# Inside trainer, lower layers know nothing of the ones above them.
TRAINER_LAYERS = (
    {"args", "sampler", "tensorfile", "devices"},
    {"foreign"},
    {"hooks", "checkpoint", "planner"},
    {"loggers", "parallel"},
    {"trainer"},
    {"nnscaler_engine", "engine"},
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


@pytest.mark.parametrize("room", ["llama3", "trainer"])
def test_no_arrow_leads_back_or_across(room):
    others = {"train", *ROOMS} - {room}
    for path in (ROOT / room).glob("*.py"):
        crossing = {name for name in imports(path) if name.split(".")[0] in others}
        assert not crossing, f"{path.name} imports {crossing}"


def test_inside_trainer_arrows_lead_down():
    level = {name: index for index, layer in enumerate(TRAINER_LAYERS) for name in layer}
    for path in (ROOT / "trainer").glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            if name.startswith("trainer.") and (target := name.split(".")[1]) in level:
                assert level[target] <= level[path.stem], f"{path.name} imports {target}"


def test_help_answers_at_once():
    def seconds():
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "train.py", "--help"],
            cwd=ROOT,
            env=environment(),
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - began

    heavy = {"torch", "transformers", "datasets", "numpy"}
    probe = f"import sys, train; print(sorted(set(sys.modules) & {heavy!r}))"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, env=environment(), check=True, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "[]"
    assert min(seconds() for _ in range(3)) < 0.5


def test_every_module_says_its_job():
    for path in [ROOT / "train.py", *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring and docstring.splitlines()[0].strip(), path


def test_nothing_reads_pickles():
    for path in [ROOT / "train.py", *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]:
        text = path.read_text()
        assert "import pickle" not in text and "trust_remote_code=True" not in text
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path.name}: {line}"
