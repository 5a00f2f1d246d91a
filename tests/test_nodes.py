"""Several nodes train as one, or all end with the same sentence."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from helpers import runs
from helpers.forks import Ranks, environment, free_port, start_process
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
        started = []
        port = free_port()
        common = [*flags, "--dataset_path=data", "--max_train_steps=2", *outputs(tmp_path)]
        files = [tmp_path / "first.txt", tmp_path / "second.txt"]
        for node, more in enumerate((first, second)):
            argv = [runs.ROOT / "train.py", *common, *more]
            options = dict(node=node, nodes=2, port=port, cwd=str(tmp_path / files[node].stem))
            started.append(Ranks(ranks, argv, environment(), files[node], files[node], **options))
        try:
            codes = [node.wait(120) for node in started]
        finally:
            for node in started:
                node.kill()
        return codes, [file.read_text() for file in files]

    return start


def test_two_torchruns_of_two_ranks_have_the_losses_of_one_rank(flags, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    command = [*runs.launcher(2, "--nnodes=2", "--rdzv-backend=c10d", endpoint, "--local-addr=127.0.0.1")]
    batch = ["--global_batch_size=8", "--max_train_steps=3"]
    command += ["train.py", *flags, *batch, "--dp_replicate=2", *outputs(tmp_path)]
    with open(tmp_path / "output", "w") as output:
        both = [start_process(command, stdout=output, stderr=output) for _ in range(2)]
    try:
        assert [process.wait(240) for process in both] == [0, 0], (tmp_path / "output").read_text()
    finally:
        for process in both:
            process.kill()
    runs.python("train.py", *flags, *batch, *outputs(tmp_path / "one"))
    for key in ("train_loss", "gnorm"):
        expected, found = runs.column(tmp_path / "one", key), runs.column(tmp_path, key)
        assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4)


WRONG = {
    "another rate": ("--learning_rate=1e-2", "has --learning_rate 0.01, rank 0 has 0.001. Start every"),
    "another end": ("--max_train_steps=3", "has --max_train_steps 3, rank 0 has 2. Start every"),
    "a flag that does not exist": ("--learning_rte=1", "Use --learning_rate"),
    "data that are not there": ("", "data is not prepared"),
    "another mode": ("--evaluate", "has --evaluate True, rank 0 has False. Start every"),
    "a save_dir that is not shared": ("--save_dir={}/other", "Name a --save_dir that all nodes share"),
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


def ranks_of(agent) -> list[int]:
    """Return the process ids of an agent's ranks."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, name in names.items() if b"train.py" in name]


@pytest.mark.parametrize("node", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_torchruns_continue_by_themselves_after_a_rank_is_killed_in_a_save(flags, tmp_path, node):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    torchrun = [*runs.launcher(1, "--nnodes=2", "--rdzv-backend=c10d", endpoint, "--local-addr=127.0.0.1")]
    training = [*flags, "--max_train_steps=40", "--save_every_n_train_steps=1", "--resume_from=last"]
    command = [*torchrun, "--max_restarts=3", "train.py", *training, *outputs(tmp_path)]
    files = [tmp_path / "first.txt", tmp_path / "second.txt"]
    agents = []
    for file in files:
        with open(file, "w") as output:
            agents.append(start_process(command, stdout=output, stderr=output))
    try:
        still_runs = lambda: agents[0].poll() is None  # noqa: E731
        saved = lambda: (tmp_path / "ckpt" / "0000-0004").exists()  # noqa: E731
        runs.wait_for(saved, still_runs, files[0])
        in_save = lambda: any((tmp_path / "ckpt").glob(".saving-*"))  # noqa: E731
        runs.wait_for(in_save, still_runs, files[0])
        os.kill(ranks_of(agents[node])[0], signal.SIGKILL)
        codes = [agent.wait(300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert codes == [0, 0], "".join(file.read_text()[-3000:] for file in files)
    assert any("resumed from" in file.read_text() for file in files)
    assert len(runs.column(tmp_path, "train_loss")) == 40
    whole = [*flags, "--max_train_steps=40", *outputs(tmp_path / "whole")]
    runs.torchrun(2, "train.py", *whole)
    assert runs.column(tmp_path, "train_loss") == runs.column(tmp_path / "whole", "train_loss")
