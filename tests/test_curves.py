"""tools.curves answers wrong use and damaged metrics with a sentence."""

import json
import statistics

import pytest
import yaml
from helpers.runs import python

from tools.curves import figure, read_metrics, validation_summary
from trainer.loggers import _step

DAMAGED = (b"not JSON", b"[1, 2]", b'"text"', b"\xff\xfe", b"{}", b'{"step": null}', b'{"step": Infinity}')


@pytest.fixture
def log_dir(tmp_path):
    """A run's metrics with damage between the rows, and half a line at the end."""
    good = b'{"step": 1, "train_loss": 3, "val_loss": 2.5}', b'{"step": 2, "train_loss": "x", "val_loss": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *DAMAGED, good[1], b'{"step": 3, "tr']))
    return tmp_path


def test_damaged_lines_are_named_and_left_out(log_dir):
    comparison = log_dir / "both.png"
    done = python("-m", "tools.curves", log_dir, log_dir, f"--output_path={comparison}")
    assert done.stdout.count("validation loss 2.5000 at step 1, 2.0000 at step 2: -0.5000") == 2
    assert f"{comparison}: the 2 runs in one picture" in done.stdout and comparison.stat().st_size > 10000
    named = [number for number in range(1, 12) if f"metrics.jsonl, line {number} " in done.stderr]
    assert named == list(range(2, 2 + len(DAMAGED)))
    assert "Traceback" not in done.stderr and (log_dir / "curves.png").stat().st_size > 10000
    assert [row["step"] for row in read_metrics(log_dir)] == [1, 2]


def test_a_resume_ranks_damaged_lines_after_every_step():
    assert [_step(line.decode(errors="replace")) for line in DAMAGED] == [float("inf")] * len(DAMAGED)


MISSING = "tests/metrics.jsonl: No such file or directory; name a run's --log_dir"
WRONG_USE = [("--help", 0, "LOG_DIR [LOG_DIR ...]"), ("", 2, "required: LOG_DIR"), ("tests", 2, MISSING)]


@pytest.mark.parametrize("argument, code, said", WRONG_USE)
def test_wrong_use_is_a_sentence(argument, code, said):
    done = python("-m", "tools.curves", *argument.split(), check=False)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def metrics(steps: int) -> list[dict]:
    """Rows as a run writes them: two saves, three validations, and a step that was skipped."""
    wave = [3 - step / 100 + (step * 7 % 5) / 10 for step in range(steps)]
    rows = [
        dict(step=step, train_loss=loss, lr=1e-3 * step, gnorm=2 * loss, tokens_per_second=1e4 + step)
        for step, loss in enumerate(wave, 1)
    ]
    rows[6] |= dict(train_loss=None, gnorm=None, skipped_samples=[4, 5])
    rows += [dict(step=step, val_loss=2.5 - step / 100, perplexity=9.0) for step in (1, 10, steps)]
    return rows + [dict(step=step, save_blocked_seconds=1, save_total_seconds=2) for step in (11, steps)]


def drawn(axis) -> dict[str, tuple]:
    """What the lines of a panel show, by label."""
    return {line.get_label(): tuple(map(tuple, line.get_data())) for line in axis.lines}


@pytest.mark.parametrize("steps", [20, 90])
def test_the_lines_are_the_metrics(tmp_path, steps):
    parents = {"run": "c", "parents": [["a", 5], ["b", 12]], "ranks": 8}
    (tmp_path / "run.json").write_text(json.dumps(parents))
    flags = dict(model_id="org/llama", dataset_id="texts/*.txt", learning_rate=2e-5, precision="bf16")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(flags | dict(max_seq_len=32, global_batch_size=64)))
    rows = metrics(steps)
    found = figure([(tmp_path, rows)])
    panels = {axis.get_title(): axis for axis in found.axes}
    for title, name in {"loss (nats per token)": "train_loss", "gradient norm": "gnorm"}.items():
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        assert tuple(zip(*known, strict=True)) == tuple(map(tuple, panels[title].lines[0].get_data()))
    shown, losses = drawn(panels["loss (nats per token)"]), [row.get("train_loss") for row in rows[:steps]]
    assert shown["validation"] == ((1, 10, steps), (2.49, 2.4, 2.5 - steps / 100))
    assert shown["saved"][0] == (11, steps) and shown["skipped, not finite"][0] == (7,)
    resumed = [x for line in panels["loss (nats per token)"].lines for x in {*line.get_xdata()} if x % 1]
    assert resumed == [5.5, 12.5] and "resumed" in shown
    if steps > 40:  # the smoothed line: means over a twentieth of the run, around each step
        finite = [loss for loss in losses if loss is not None]
        half = len(finite) // 20
        means = [statistics.mean(finite[max(0, n - half) : n + half + 1]) for n in range(len(finite))]
        assert shown["training"][1] == pytest.approx(means)
    speed = panels["tokens per second"].lines[0].get_ydata()
    assert [*speed] == [1e4 + step for step in range(1, steps + 1)]
    said = " ".join(text.get_text() for text in found.texts)
    for part in ("llama, on *.txt, 64 samples of 32 tokens a step", "learning rate 2e-05, bf16, 8 ranks"):
        assert part in said
    assert found.get_suptitle() == tmp_path.name


def test_a_comparison_names_each_run(tmp_path):
    names = ("one", "other")
    found = figure([(tmp_path / name, metrics(20 + 30 * (name == "one"))) for name in names])
    loss = next(axis for axis in found.axes if "loss" in axis.get_title())
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [*names]
    colors = {line.get_color() for line in loss.lines}
    assert len(colors) == 2 and drawn(loss)["other"][0] == tuple(n for n in range(1, 21) if n != 7)


def test_a_later_rise_of_the_validation_loss_is_said():
    said = "validation loss 3.0000 at step 0, 2.5000 at step 9: -0.5000 (best: 2.2500 at step 5)"
    assert validation_summary([(0, 3.0), (5, 2.25), (9, 2.5)]) == said
