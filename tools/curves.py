"""Draws a run's metrics.jsonl as curves.png: python -m tools.curves LOG_DIR."""

import json
import sys
from pathlib import Path


def read_metrics(log_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, without the half line that a killed run may leave at the end."""
    rows = []
    for line in (log_dir / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def draw(log_dir: Path) -> Path:
    """Draws training and validation loss, learning rate, gradient norm and speed over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(log_dir)
    panels = [("train_loss", "val_loss"), ("lr",), ("gnorm",), ("tokens_per_second",)]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, names in zip(axes.flat, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), ".-" if len(points) < 30 else "-", label=name)
        axis.set(xlabel="step", title=" and ".join(names))
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(log_dir / "curves.png", dpi=100)
    pyplot.close(figure)
    return log_dir / "curves.png"


def validation_summary(log_dir: Path) -> str:
    """The run's first and last validation loss, in nats per token."""
    rows = [row for row in read_metrics(log_dir) if row.get("val_loss") is not None]
    if not rows:
        return "the run was not validated"
    change = rows[-1]["val_loss"] - rows[0]["val_loss"]
    before, after = (f"{row['val_loss']:.4f} at step {row['step']}" for row in (rows[0], rows[-1]))
    return f"validation loss {before}, {after}: {change:+.4f}"


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
    print(validation_summary(Path(sys.argv[1])))
