"""Draws the metrics.jsonl of runs: python -m tools.curves LOG_DIR [LOG_DIR ...]."""

import argparse
import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
RUNS = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
# Metric -> its axis, with the unit.
PANELS = {
    "train_loss": "loss (nats per token)",
    "lr": "learning rate",
    "gnorm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
}


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
                logger.warning("%s, line %d is no row of metrics: left out", path, number)
    return rows


def points(rows: list[dict], name: str) -> list[tuple]:
    """(step, value) of the rows that have such a number."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def smoothed(values: list[float]) -> list[float]:
    """The mean over a twentieth of the run around each step; fewer steps at the ends."""
    import numpy as np

    window = np.ones(max(1, len(values) // 20 * 2 + 1))
    return (np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")).tolist()


def draw(log_dir: Path) -> list[dict]:
    """Draws the run's curves.png; returns its rows."""
    rows = read_metrics(log_dir)
    _save([(log_dir, rows)], log_dir / "curves.png")
    return rows


def _save(runs: list[tuple[Path, list[dict]]], path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure(runs).savefig(path, dpi=110)


def figure(runs: list[tuple[Path, list[dict]]]):
    """A picture of the losses, and below of the learning rate, the gradient norm and the speed.

    runs: pairs of a run's folder and its rows. Several share each panel, in a colour each.
    """
    from matplotlib.figure import Figure

    found = Figure(figsize=(10, 7), layout="constrained")
    axes = found.subplot_mosaic([["train_loss"] * 3, [*PANELS][1:]], height_ratios=[5, 3])
    for name, label in PANELS.items():
        axes[name].set(title=label, xlabel="optimizer step")
    for (log_dir, rows), color in zip(runs, RUNS * len(runs), strict=False):
        for name, axis in axes.items():
            label = log_dir.resolve().name if len(runs) > 1 else "training" if name == "train_loss" else None
            curve(axis, points(rows, name), color, label, smooth=name != "lr")
        if validated := points(rows, "val_loss"):
            label = "validation" if len(runs) == 1 else None
            style = dict(color=RED, mec="white") if len(runs) == 1 else dict(color=color, mec="black")
            axes["train_loss"].plot(*zip(*validated, strict=True), "o--", ms=6, lw=1, label=label, **style)
        if len(runs) == 1:
            _mark_events(axes["train_loss"], rows, _read(log_dir / "run.json").get("parents", []))
    axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    for name in ("lr", "gnorm", "tokens_per_second"):
        axes[name].set_ylim(bottom=0)
    if axes["train_loss"].lines:
        axes["train_loss"].legend(loc="upper right")
    title = runs[0][0].resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    found.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    corner = configuration(runs[0][0]) if len(runs) == 1 else "points: validation"
    found.text(0.99, 0.985, corner, ha="right", va="top", fontsize=9, color=GREY)
    return found


def curve(axis, found: list[tuple], color: str, label: str | None, smooth: bool = True) -> None:
    """Each step's value, if wanted in a light tone and the smoothed ones over it; few steps as points."""
    if not found:
        return
    steps, values = zip(*found, strict=True)
    if not smooth or len(steps) < 40:
        axis.plot(steps, values, "o-" if len(steps) < 40 else "-", ms=3, color=color, label=label)
    else:
        axis.plot(steps, values, color=color, alpha=0.25, lw=1)
        axis.plot(steps, smoothed(values), color=color, lw=1.8, label=label)


def _mark_events(axis, rows: list[dict], parents: list) -> None:
    """Marks saves and skipped steps at the panel's lower edge, and resumes as lines."""
    for number, (_, step) in enumerate(parents):
        axis.axvline(step + 0.5, color=GREY, ls=":", lw=1.2, label=None if number else "resumed")
    saved = sorted({row["step"] for row in rows if "save_total_seconds" in row})
    skipped = [row["step"] for row in rows if row.get("skipped_samples")]
    events = (saved, "^", GREEN, "saved"), (skipped, "X", ORANGE, "skipped, not finite")
    for steps, marker, color, label in events:
        if steps:
            edge = dict(transform=axis.get_xaxis_transform(), clip_on=False, zorder=3)
            axis.plot(steps, [0.02] * len(steps), marker, ms=7, color=color, mec="white", label=label, **edge)


def configuration(log_dir: Path) -> str:
    """The run's model, data, batch, rate, precision and ranks in two lines, as far as its files say them."""
    flags, run = _read(log_dir / "config.yaml"), _read(log_dir / "run.json")
    known = dict(flags, ranks=run.get("ranks"))
    for name in ("model_id", "dataset_id"):
        known[name] = known.get(name) and Path(str(known[name])).name
    if known.get("lora_rank"):
        known["model_id"] = f"{known['model_id']} (LoRA of rank {known['lora_rank']})"
    first = "{model_id}", "on {dataset_id}", "{global_batch_size} samples of {max_seq_len} tokens a step"
    second = "learning rate {learning_rate:g}", "{lr_scheduler}", "{precision}", "{ranks} ranks"
    known = {name: value for name, value in known.items() if value is not None}
    return "\n".join(
        ", ".join(filter(None, (_filled(part, known) for part in line))) for line in (first, second)
    )


def _filled(text: str, known: dict) -> str:
    """The text with its values; empty where one is not known, or is of another kind."""
    try:
        return text.format(**known)
    except (KeyError, ValueError, TypeError):
        return ""


def _read(path: Path) -> dict:
    """A file of JSON or YAML, which includes JSON; {} if it is not there, or damaged."""
    import yaml

    try:
        return {**yaml.safe_load(path.read_text())}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def validation_summary(losses: list[tuple]) -> str:
    """The run's first and last validation loss, in nats per token, and the best if that is another."""
    if len(losses) < 2:
        return f"validation loss {losses[0][1]:.4f}" if losses else "the run was not validated"
    before, after = (f"{loss:.4f} at step {step}" for step, loss in (losses[0], losses[-1]))
    step, best = min(losses, key=lambda pair: pair[1])
    lowest = f" (best: {best:.4f} at step {step})" if best < losses[-1][1] else ""
    return f"validation loss {before}, {after}: {losses[-1][1] - losses[0][1]:+.4f}{lowest}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.curves", description=__doc__)
    folders = dict(nargs="+", type=Path, metavar="LOG_DIR", help="a run's --log_dir, which gets a curves.png")
    parser.add_argument("log_dir", **folders)
    text = "where several runs are drawn in one picture (./curves.png)"
    parser.add_argument("--output_path", type=Path, default=Path("curves.png"), help=text)
    args = parser.parse_args()
    try:
        runs = [(log_dir, draw(log_dir)) for log_dir in args.log_dir]
        for log_dir, rows in runs:
            print(f"{log_dir / 'curves.png'}: {validation_summary(points(rows, 'val_loss'))}")
        if len(runs) > 1:
            _save(runs, args.output_path)
            print(f"{args.output_path}: the {len(runs)} runs in one picture")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; name a run's --log_dir that can be written")


if __name__ == "__main__":
    main()
