"""Several nodes, each with a torchrun on loopback, train as one, or all end with the same sentence."""

import socket
import subprocess
import sys

import pytest
from helpers import runs
from helpers.runs import outputs, rows


@pytest.fixture
def nodes(flags, prepared, tmp_path):
    """Starts two nodes of one rank with flags of their own; returns exit codes and what they said.

    Each starts in a folder of its own, where `data` are the prepared data.
    """
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(prepared)

    def start(first: list, second: list) -> tuple[list[int], list[str]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d"]
        launcher += [endpoint, "--rdzv-id=1", "--local-addr=127.0.0.1", runs.ROOT / "train.py"]
        started = []
        common = [*flags, "--dataset_path=data", "--max_train_steps=2", *outputs(tmp_path)]
        for name, more in (("first", first), ("second", second)):
            command = [sys.executable, *launcher, *common, *more]
            options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started.append(subprocess.Popen(command, cwd=tmp_path / name, env=runs.environment(), **options))
        try:
            said = [process.communicate(timeout=120)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        return [process.returncode for process in started], said

    return start


def test_two_nodes_train_as_one(nodes, tmp_path):
    codes, said = nodes([], [])
    assert codes == [0, 0], said
    assert list(rows(tmp_path / "log", "train_loss")) == [1, 2]


WRONG = {
    "another learning rate": (
        "--learning_rate=1e-2",
        "has --learning_rate 0.01, rank 0 has 0.001: start every",
    ),
    "another end": ("--max_train_steps=3", "has --max_train_steps 3, rank 0 has 2: start every"),
    "a flag that does not exist": ("--learning_rte=1", "did you mean --learning_rate?"),
    "data that are not there": ("", "data is not prepared"),
    "another mode": ("--evaluate", "has --evaluate True, rank 0 has None: start every"),
    "a save_dir that is not shared": ("--save_dir={}/other", "name a --save_dir that all nodes share"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_one_node_does_otherwise_ends_all_with_the_same_sentence(nodes, tmp_path, case):
    flag, expected = WRONG[case]
    if not flag:
        (tmp_path / "second" / "data").unlink()
    codes, said = nodes([], [flag.format(tmp_path)] if flag else [])
    assert codes == [1, 1] and all(expected in text for text in said), said
    assert not (tmp_path / "log" / "metrics.jsonl").exists()
