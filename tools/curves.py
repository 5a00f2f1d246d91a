"""Draws the metrics.jsonl of runs as curves.png: python -m tools.curves LOG_DIR [LOG_DIR ...]."""

import argparse
import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def read_metrics(log_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, without damaged ones and the half line that a killed run may leave last."""
    rows, path = [], log_dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            if number < len(lines):
                logger.warning("WARNING: %s, line %d is no row of metrics: left out", path, number)
    return rows


def points(rows: list[dict], name: str) -> list[tuple]:
    """(step, value) of the rows that have such a number."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def draw(log_dir: Path) -> str:
    """Draws the losses, learning rate, gradient norm and speed over the steps; returns what to tell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(log_dir)
    panels = [("train_loss", "val_loss"), ("lr",), ("gnorm",), ("tokens_per_second",)]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, names in zip(axes.flat, panels, strict=True):
        for name in names:
            if found := points(rows, name):
                axis.plot(*zip(*found, strict=True), ".-" if len(found) < 30 else "-", label=name)
        axis.set(xlabel="step", title=" and ".join(names))
        axis.grid(alpha=0.3)
    if axes.flat[0].lines:
        axes.flat[0].legend()
    figure.savefig(log_dir / "curves.png", dpi=100)
    pyplot.close(figure)
    return f"{log_dir / 'curves.png'}: {validation_summary(points(rows, 'val_loss'))}"


def validation_summary(losses: list[tuple]) -> str:
    """The run's first and last validation loss, in nats per token."""
    if len(losses) < 2:
        return f"validation loss {losses[0][1]:.4f}" if losses else "the run was not validated"
    before, after = (f"{loss:.4f} at step {step}" for step, loss in (losses[0], losses[-1]))
    return f"validation loss {before}, {after}: {losses[-1][1] - losses[0][1]:+.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.curves", description=__doc__)
    parser.add_argument("log_dir", nargs="+", type=Path, metavar="LOG_DIR", help="a run's --log_dir")
    for log_dir in parser.parse_args().log_dir:
        try:
            print(draw(log_dir))
        except OSError as error:
            parser.error(f"{error.filename}: {error.strerror}; name a run's --log_dir that can be written")


if __name__ == "__main__":
    main()
