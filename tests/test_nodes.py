"""Several nodes, each with a torchrun on loopback, train as one, or all end with the same sentence."""

import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import runs
from helpers.runs import outputs


@pytest.fixture
def nodes(flags, prepared, tmp_path):
    """Starts two nodes with flags of their own; returns exit codes and what they said.

    Each starts in a folder of its own, where `data` are the prepared data.
    """
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(prepared)

    def start(first: list, second: list, ranks: int = 1) -> tuple[list[int], list[str]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={ranks}"]
        launcher += ["--rdzv-backend=c10d", endpoint, "--rdzv-id=1", "--local-addr=127.0.0.1"]
        started = []
        common = [*flags, "--dataset_path=data", "--max_train_steps=2", *outputs(tmp_path)]
        for name, more in (("first", first), ("second", second)):
            command = [sys.executable, *launcher, runs.ROOT / "train.py", *common, *more]
            options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started.append(subprocess.Popen(command, cwd=tmp_path / name, env=runs.environment(), **options))
        try:
            said = [process.communicate(timeout=120)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        return [process.returncode for process in started], said

    return start


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_nodes_of_two_ranks_have_the_losses_of_one_rank(nodes, flags, tmp_path, replicas):
    batch = ["--global_batch_size=8", "--max_train_steps=3"]
    mesh = [*batch, f"--dp_replicate={replicas}"]
    codes, said = nodes(mesh, mesh, ranks=2)
    assert codes == [0, 0], said
    runs.python("train.py", *flags, *batch, *outputs(tmp_path / "one"))
    for key in ("train_loss", "gnorm"):
        expected, found = runs.column(tmp_path / "one", key), runs.column(tmp_path, key)
        assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4)


WRONG = {
    "another rate": ("--learning_rate=1e-2", "has --learning_rate 0.01, rank 0 has 0.001: start every"),
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


@pytest.mark.parametrize("other, code", [("--seed=0", 0), ("--learning_rate=1e-2", 1)])
def test_the_doctor_compares_the_nodes(nodes, tmp_path, other, code):
    report = f"--output_path={tmp_path / 'report.json'}"
    codes, said = nodes(["--doctor", report], ["--doctor", report, other])
    assert codes == [code, code], said
    lines = [line for line in said[0].splitlines() if line.startswith(("ok", "warning", "fault"))]
    status = {line.split()[1]: line.split()[0] for line in lines}
    assert status["nodes"] == ("fault" if code else "ok") and status["clocks"] == status["data"] == "ok"
    assert "gloo sum right over 2 ranks" in said[0] and "(2 ranks); clocks within" in said[0]
    assert ("rank 1" in said[0] and "has --learning_rate 0.01, rank 0 has 0.001" in said[0]) == bool(code)
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert f"versions on {os.uname().nodename}" in [check["check"] for check in checks]  # the other node's
