"""The house: which room may know which, what a reader meets first, and how much of it there is."""

import ast
import resource
from pathlib import Path

import pytest
from helpers.runs import ROOT, python

LEAVES = ("errors", "downloads", "tokens")
# Room -> the rooms that it may import, besides itself and the leaves.
ARROWS = {
    "cli": {"tools", "plan", "dataset", "llama3", "trainer"},
    "tools": {"dataset", "llama3", "trainer"},
    "plan": {"dataset", "llama3", "trainer"},
    "dataset": set(),
    "llama3": set(),
    "trainer": set(),
}
ROOMS = tuple(ARROWS)
PRODUCT = [
    ROOT / "train.py",
    *(ROOT / f"{leaf}.py" for leaf in LEAVES),
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))),
]
# Inside trainer, a layer imports none of those after it.
TRAINER_LAYERS = (
    {"args", "ending", "machine", "tensorfile", "trainable"},
    {"checkpoint", "parallel", "loading"},
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


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_leads_back_or_across(room):
    forbidden = {"train", *ROOMS} - {room} - ARROWS[room]
    for path in (ROOT / room).rglob("*.py"):
        crossing = {name for name in imports(path) if name.split(".")[0] in forbidden}
        if room == "llama3":  # models derive from the Trainer's base class
            crossing -= {"trainer.trainable", "trainer.trainable.TrainableModel"}
        assert not crossing, f"{path.name} imports {crossing}"


def test_leaves_import_no_room():
    for leaf in LEAVES:
        assert not {name.split(".")[0] for name in imports(ROOT / f"{leaf}.py")} & {"train", *ROOMS}


def test_inside_trainer_arrows_lead_down():
    level = {name: index for index, layer in enumerate(TRAINER_LAYERS) for name in layer}
    for path in (ROOT / "trainer").rglob("*.py"):
        room = path.relative_to(ROOT / "trainer").parts[0].removesuffix(".py")
        for name in imports(path) if room != "__init__" else ():
            if name.startswith("trainer.") and (target := name.split(".")[1]) in level:
                assert level[target] <= level[room], f"{path.name} imports {target}"


def cpu_seconds() -> float:
    """Return the CPU time of the children that have ended: a busy machine does not change it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


HELP = """
import runpy, sys
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as error:
    assert error.code in (0, None)
heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
sys.exit(f"imports {heavy}" if heavy else 0)
"""


def test_help_answers_at_once():
    before = cpu_seconds()
    done = python("-c", HELP, "--help", real=True)
    assert "--max_train_steps" in done.stdout
    assert cpu_seconds() - before < 2  # it takes 0.2, and torch alone 2.5


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
