"""Machines without fast bf16, memory, a home folder, an address of their own or a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.runs import HELPERS, ROOT, environment, outputs, python, torchrun

import train
from trainer import machine

# oneDNN and ATen then use no instructions beyond AVX2's: such a CPU has no fast bf16.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CPU = torch.device("cpu")
HERE_BF16 = machine.computes_in_bf16(CPU)
GIB = 2**30


def auto(flags: list[str]) -> list[str]:
    """Return the flags without their precision."""
    return [flag for flag in flags if not flag.startswith("--precision")] + ["--max_train_steps=2"]


def saved_precision(run: Path) -> str:
    return yaml.safe_load((run / "log" / "config.yaml").read_text())["precision"]


def precision_line(text: str) -> str:
    """Return the banner's line on precision."""
    (line,) = [line for line in text.splitlines() if line.startswith("  precision ")]
    return line.removeprefix("  precision").strip()


# ---------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def avx2_run(flags, tmp_path_factory):
    """A run with --precision=auto on a CPU without fast bf16: its folder and its output."""
    folder = tmp_path_factory.mktemp("avx2")
    process = python("train.py", *auto(flags), *outputs(folder), real=True, **AVX2)
    return folder, process.stderr


def test_without_fast_bf16_a_run_is_in_fp32_and_says_why(avx2_run):
    folder, output = avx2_run
    assert precision_line(output).startswith("fp32 (this CPU has no fast bf16), ")
    assert saved_precision(folder) == "fp32"
    assert "WARNING: --precision" not in output


@pytest.mark.skipif(not HERE_BF16, reason="this CPU has no fast bf16")
def test_with_fast_bf16_a_run_is_in_bf16(flags, tmp_path):
    process = python("train.py", *auto(flags), *outputs(tmp_path))
    assert precision_line(process.stderr).startswith("bf16, ")
    assert saved_precision(tmp_path) == "bf16"


@pytest.mark.slow
def test_a_resume_and_an_export_take_the_resolved_precision(avx2_run, flags, tmp_path):
    last = avx2_run[0] / "ckpt" / "last"
    longer = [*auto(flags), f"--resume_from={last}", "--max_train_steps=3", *outputs(tmp_path / "resumed")]
    process = python("train.py", *longer)
    reason = "the checkpoint's" if HERE_BF16 else "this CPU has no fast bf16"
    assert precision_line(process.stderr).startswith(f"fp32 ({reason}), ")
    assert saved_precision(tmp_path / "resumed") == "fp32"
    assert train.main([f"--export_hf={last}", f"--output_path={tmp_path / 'hf'}"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_bf16_without_a_fast_device_is_honoured_with_one_warning(avx2_run, flags, tmp_path):
    last = avx2_run[0] / "ckpt" / "last"
    longer = [*auto(flags), f"--resume_from={last}", "--max_train_steps=3", *outputs(tmp_path)]
    process = torchrun(2, "train.py", *longer, "--precision=bf16", real=True, **AVX2)
    assert precision_line(process.stderr).startswith("bf16, ")
    assert process.stderr.count("Go on in fp32 with --precision=fp32") == 1
    assert saved_precision(tmp_path) == "bf16"
    # A resume takes it from there, and warns too.
    again = [*auto(flags), "--resume_from=last", "--max_train_steps=4", *outputs(tmp_path)]
    process = python("train.py", *again, real=True, **AVX2)
    assert precision_line(process.stderr).startswith("bf16, ")
    assert process.stderr.count("Go on in fp32 with --precision=fp32") == 1


@pytest.mark.slow
def test_evaluation_and_generation_are_in_fp32_too(avx2_run, flags):
    generated = python("train.py", *auto(flags), "--generate=the", "--max_new_tokens=1", real=True, **AVX2)
    (model_id,) = [flag.removeprefix("--model_id=") for flag in flags if flag.startswith("--model_id=")]
    assert f"model: {model_id}, in fp32" in generated.stderr
    evaluated = python("train.py", *auto(flags), "--evaluate", real=True, **AVX2).stdout
    explicit = python("train.py", *auto(flags), "--evaluate", "--precision=fp32", real=True, **AVX2).stdout
    assert evaluated == explicit and "val_loss=" in evaluated


@pytest.mark.skipif(not HERE_BF16, reason="this CPU has no fast bf16")
@pytest.mark.slow
def test_rank_0_decides_for_all_ranks(flags, tmp_path):
    script = tmp_path / "as_rank.py"
    script.write_text(
        "import os, sys\n"
        f"os.environ.update({AVX2} if os.environ['RANK'] == '0' else {{}})\n"
        "import train\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    process = torchrun(2, script, *auto(flags), *outputs(tmp_path), real=True, **HELPERS)
    assert precision_line(process.stderr).startswith("fp32 (this CPU has no fast bf16), ")
    assert saved_precision(tmp_path) == "fp32"


@pytest.mark.slow
def test_a_plan_is_in_bf16_on_gpus_and_as_this_machine_on_a_cpu(flags):
    plan = ["train.py", "--plan", *auto(flags), "--world_size=2"]
    assert "tokens a step in bf16, on 2 x h100-80g" in python(*plan, real=True, **AVX2).stdout
    assert "tokens a step in fp32, on 2 x cpu" in python(*plan, "--device_type=cpu", real=True, **AVX2).stdout


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bw": False}, False),
        ({"architecture": "x86_64", "avx2": True, "avx512_bw": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
    ],
)
def test_a_torch_without_the_private_operator_asks_the_public_capabilities(
    monkeypatch, capabilities, expected
):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.computes_in_bf16(CPU) is expected


# ---------------------------------------------------------------- a container's limits


def make_root(folder: Path, cgroup: str, files: dict[str, str]) -> Path:
    """Make the files of a machine of 16 GiB, 8 of them free, with a process in that cgroup.

    files: their contents by their names below sys/fs/cgroup.
    """
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    (folder / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


LIMITS = {
    "no limit": ("0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "1000\n"}, (16 * GIB, 8 * GIB)),
    "version 2": (
        "0::/a/b\n",
        {
            "a/b/memory.max": f"{3 * GIB}\n",
            "a/b/memory.current": f"{2 * GIB}\n",
            "a/b/memory.stat": f"anon {GIB}\ninactive_file {GIB // 2}\n",
        },
        (3 * GIB, 1.5 * GIB),
    ),
    "version 2, a limit above the process's own group": (
        "0::/a/b\n",
        {
            "a/memory.max": f"{2 * GIB}\n",
            "a/memory.current": f"{GIB}\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "7\n",
        },
        (2 * GIB, GIB),
    ),
    "version 2, a container that sees only its own root": (
        "0::/system.slice/docker-1.scope\n",
        {"memory.max": f"{2 * GIB}\n", "memory.current": f"{GIB}\n"},
        (2 * GIB, GIB),
    ),
    "version 1": (
        "5:cpuacct,cpu:/a\n4:memory:/a\n0::/\n",
        {
            "memory/a/memory.limit_in_bytes": f"{GIB}\n",
            "memory/a/memory.usage_in_bytes": f"{GIB // 2}\n",
            "memory/a/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 4}\n",
        },
        (GIB, 0.75 * GIB),
    ),
    "version 1, no limit": (
        "4:memory:/\n",
        {
            "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "memory/memory.usage_in_bytes": "4096\n",
        },
        (16 * GIB, 8 * GIB),
    ),
    "a full group": (
        "0::/\n",
        {"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"},
        (GIB, 0),
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_memory_is_the_least_of_the_hosts_and_the_cgroups(tmp_path, case):
    cgroup, files, expected = LIMITS[case]
    assert machine.memory(make_root(tmp_path, cgroup, files)) == expected


@pytest.mark.parametrize(
    "cgroup, files, expected",
    [
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, 0.5),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "75000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            0.75,
        ),
        ("", {}, None),
    ],
)
def test_cores_are_the_least_of_the_hosts_and_the_cgroups(tmp_path, cgroup, files, expected):
    if expected is None:
        expected = len(os.sched_getaffinity(0))
    assert machine.cores(make_root(tmp_path, cgroup, files)) == expected


def test_a_run_that_exceeds_the_free_memory_is_warned(flags, tmp_path, monkeypatch, caplog):
    parameters = 48_352
    memory = machine.memory()._replace(free=16 * parameters - 1)
    monkeypatch.setattr(machine, "memory", lambda: memory)
    assert train.main([*flags, "--max_train_steps=1", *outputs(tmp_path / "more")]) == 0
    assert "The kernel may kill the run" in caplog.text
    caplog.clear()
    memory = memory._replace(free=16 * parameters)
    assert train.main([*flags, "--max_train_steps=1", *outputs(tmp_path / "fits")]) == 0
    assert "The kernel may kill the run" not in caplog.text


# ---------------------------------------------------------------- no home, no name, no compiler


def in_namespace(*options: str) -> list[str]:
    """Return a command that runs what follows in namespaces of its own; skip where there may be none."""
    command = ["unshare", *options]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody make such a namespace")
    return command


def run(command: list, **env: str) -> subprocess.CompletedProcess:
    options = dict(cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=300)
    return subprocess.run([str(word) for word in command], **options)


@pytest.mark.slow
def test_a_user_without_a_home_trains_and_is_told_once(flags, tmp_path):
    command = in_namespace("-U", "--map-user=12345", "--map-group=12345")
    command += [
        "env",
        "-u",
        "HOME",
        "-u",
        "XDG_CACHE_HOME",
        "-u",
        "USER",
        "-u",
        "LOGNAME",
        f"TMPDIR={tmp_path}",
    ]
    script = ["train.py", *flags, "--max_train_steps=1", "--compile=on", *outputs(tmp_path)]
    process = run([*command, sys.executable, *machine.ONE_MACHINE, "--nproc_per_node=2", *script])
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "train-home-12345"
    assert process.stderr.count(f"user id 12345 has no home folder: caches go to {folder}") == 1
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_home_that_somebody_else_prepared_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(machine, "_home_exists", lambda: False)
    monkeypatch.setenv("HOME", "")
    planted = tmp_path / f"train-home-{os.getuid()}"
    planted.symlink_to(tmp_path)
    machine.provide_home()
    assert Path(os.environ["HOME"]).parent == tmp_path
    assert os.environ["HOME"] != str(planted)


@pytest.mark.slow
def test_a_machine_whose_name_has_no_address_trains_and_the_doctor_says_so(flags, tmp_path):
    command = [
        *in_namespace("-u"),
        "sh",
        "-c",
        'hostname no-such-name.invalid; exec "$@"',
        "sh",
        sys.executable,
    ]
    script = ["train.py", *flags, "--max_train_steps=1", *outputs(tmp_path)]
    process = run([*command, *machine.ONE_MACHINE, "--nproc_per_node=2", *script])
    assert process.returncode == 0, process.stderr
    process = run([*command, "train.py", "--doctor", *flags])
    (line,) = [line for line in process.stdout.splitlines() if "host_name" in line]
    assert line.startswith("warning") and "no-such-name.invalid" in line
    assert "torchrun --local-addr=127.0.0.1" in line and "/etc/hosts" in line


def test_compiling_without_a_compiler_is_one_sentence_before_the_model(flags, tmp_path, capsys, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    for path, reason in ((tmp_path / "none", "is not installed"), (compiler, "no such header")):
        monkeypatch.setenv("CXX", str(path))
        assert train.main([*flags, "--compile=on", *outputs(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert "--compile=on needs a C++ compiler that works" in error and reason in error
        assert "--compile=off" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
