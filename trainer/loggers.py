"""Where metrics and progress go: metrics.jsonl, TensorBoard events, lines for a person; from rank 0."""

import collections
import contextlib
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from errors import UserError
from trainer.folders import FLAGS_FILE, contents, set_aside

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"  # beside metrics.jsonl: the run that wrote it, its parents, and its name in REPORTERS
PROJECT = "llama3"  # of wandb and trackio, unless their own environment variables name another


def perplexity(loss: float) -> float:
    """exp(loss); infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def log_save(path: Path, blocked_seconds: float, total_seconds: float, step_seconds: float) -> None:
    """Says what a save took, and warns if torchrun would kill the ranks before a step and a save are over."""
    waited = f" in the background, training waited {blocked_seconds:.1f} s"
    background = waited if blocked_seconds < total_seconds else ""
    logger.info("saved %s in %.1f s%s", path, total_seconds, background)
    needed = step_seconds + total_seconds
    allowed = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    if needed > allowed and "TORCHELASTIC_RUN_ID" in os.environ:
        logger.warning(
            "a step and a save take %.0f s, but torchrun kills its ranks %.0f s after SIGTERM: use "
            "torchrun --shutdown_timeout=%d (a TORCH_ELASTIC_SHUTDOWN_TIMEOUT as high silences this)",
            *(needed, allowed, math.ceil(3 * needed)),
        )


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min, 3.4 h, 2.1 days."""
    for unit, length, digits in (("s", 1, 0), ("min", 60, 0), ("h", 3600, 1)):
        if seconds < 100 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


class Progress:
    """Shows a person what happens: a bar on a terminal, else a line for each step; a line for a validation.

    The time left is that of the last steps' median, without the first step, which may compile.
    """

    def __init__(self, last_step: int):
        self.last_step, self._held = last_step, contextlib.ExitStack()
        self._seconds, self._bar = collections.deque(maxlen=50), None  # of the last steps

    def setup(self, run_id: str, parents: list[list], branched: bool) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        done, layout = parents[-1][1] if parents else 0, "step {n}/{total} |{bar:12}| {desc}"
        options = dict(initial=done, total=self.last_step, bar_format=layout, dynamic_ncols=True, miniters=1)
        self._bar = self._held.enter_context(tqdm(**options))
        self._held.enter_context(logging_redirect_tqdm())  # prints what is logged above the bar

    def log_metrics(self, metrics: dict, step: int, tag: str) -> None:
        if tag == "val":
            others = "".join(f" {name}={metrics[name]:.4f}" for name in list(metrics)[2:])
            logger.info(
                "step %d: val_loss=%.6f perplexity=%.4f%s",
                step,
                metrics["val_loss"],
                metrics["perplexity"],
                others,
            )
        elif tag == "train":
            self._show(metrics, step)

    def _show(self, metrics: dict, step: int) -> None:
        self._seconds.append(metrics["step_seconds"])
        recent, to_do, loss = [*self._seconds][1:], self.last_step - step, f"{metrics['train_loss']:.4f}"
        left = duration(statistics.median(recent) * to_do) if recent and to_do else ""
        numbers = f"lr {metrics['lr']:.3g}, gnorm {metrics['gnorm']:.3g}"
        numbers += f", {metrics['tokens_per_second']:,.0f} tokens/s"
        numbers += f", MFU {metrics['mfu']:.0%}" if "mfu" in metrics else ""
        numbers += f", {metrics['peak_memory_gib']:.1f} GiB"
        if self._bar:
            self._bar.set_description_str(f"{left and left + ' left, '}loss {loss}, {numbers}", refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            line = f"Epoch {metrics['epoch']}: {step}/{self.last_step} train_loss={loss}, {numbers}"
            logger.info("%s%s", line, left and f", {left} left")
        if skipped := metrics.get("skipped_samples"):
            logger.warning(
                "step %d: non-finite loss or gradient norm; update skipped (samples %s)", step, skipped
            )
        if not to_do:
            self.finalize()  # what comes after the last step stands below the bar

    def finalize(self) -> None:
        self._held.close()


class JsonlLogger:
    """Appends to `<log_dir>/metrics.jsonl`: floats at full precision, null for what is not finite.

    A resumed run continues the file: no step comes twice.
    """

    def __init__(self, log_dir: str | Path):
        self.path = Path(log_dir) / "metrics.jsonl"

    def setup(self, run_id: str, parents: list[list], branched: bool) -> None:
        """Opens the file for this run, whose parents are [run, step] of each run before it, up to which step.

        Another run's folder is set aside. Lines after the resumed step are dropped, because they come again,
        and so is its validation, if that was not finite; branched: other ones come in their place, so the
        file is set aside as it was.
        """
        folder, step = self.path.parent, parents[-1][1] if parents else 0
        reported = run_id
        if self.path.exists():
            if parents and self._continues(*parents[-1]):
                reported = self._writer().get("reported", run_id)
            else:
                set_aside(folder, contents(folder))
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= step and not _is_rejected(line, step)]
        # A resume may repeat a validation that was logged but not recorded with the checkpoint.
        self._known = {(step, *json.loads(line)) for line in kept if _step(line) == step}
        if len(kept) < len(lines):
            temporary = self.path.with_suffix(".new")
            temporary.write_text("".join(line + "\n" for line in kept))
            if branched:
                reported = run_id
                old = [path for path in (self.path, folder / FLAGS_FILE) if path.exists()]
                set_aside(folder, old, "metrics that this run does not continue")
            os.replace(temporary, self.path)
        about = {"run": run_id, "parents": parents, "reported": reported}
        about |= {"ranks": int(os.environ.get("WORLD_SIZE", 1))}
        (folder / RUN_FILE).write_text(json.dumps(about))
        self._file = open(self.path, "a", buffering=1)

    def _writer(self) -> dict:
        """What the run that wrote the file last says of itself; {} if nobody knows."""
        try:
            return {**json.loads((self.path.parent / RUN_FILE).read_text())}
        except (OSError, ValueError, TypeError):
            return {}

    def _continues(self, run: str | None, step: int) -> bool:
        """Did the run that wrote the file come by that step of that run? True if nobody knows."""
        writer = self._writer()
        try:
            return run == writer["run"] or any(run == own and step <= to for own, to in writer["parents"])
        except (ValueError, KeyError, TypeError):
            return True

    def log_metrics(self, metrics: dict, step: int, tag: str) -> None:
        if (step, "step", *metrics) in self._known:
            return
        broken = [name for name, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
        try:
            self._file.write(json.dumps({"step": step, **metrics, **dict.fromkeys(broken)}) + "\n")
        except OSError as error:
            error.filename = str(self.path)
            raise

    def finalize(self) -> None:
        self._file.close()


def _is_rejected(line: str, step: int) -> bool:
    """Return whether the line is that step's validation, which was not finite: a resume repeats it."""
    if _step(line) != step:
        return False
    return json.loads(line).get("val_loss", 0.0) is None


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf  # the half line of a killed run, or a damaged one


class TensorBoardLogger:
    """TensorBoard events in `log_dir`, tags train/... and val/..."""

    def __init__(self, log_dir: str | Path):
        self.log_dir = str(log_dir)

    def setup(self, run_id: str, parents: list[list], branched: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self.log_dir, purge_step=parents[-1][1] + 1 if parents else None)

    def log_metrics(self, metrics: dict, step: int, tag: str) -> None:
        for name, value in _numbers(metrics, tag).items():
            self._writer.add_scalar(name, value, step)

    def finalize(self) -> None:
        self._writer.close()


class _Remote:
    """A run of another program, which a resumed run continues. `config`: the run's flags."""

    def __init__(self, log_dir: str | Path, config: dict):
        self.log_dir, self.config, self._broken = Path(log_dir), config, False

    def _report(self, action: Callable, *args, **options) -> None:
        """Calls the library. Its error ends the reports, and not the run."""
        if self._broken:
            return
        try:
            action(*args, **options)
        except Exception as error:
            self._broken = True
            logger.warning("%s disabled after an error: %s", type(self).__name__, error)


class WandbLogger(_Remote):
    """A run of Weights & Biases in `log_dir`."""

    def setup(self, run_id: str, parents: list[list], branched: bool) -> None:
        import wandb

        name, project = _reported(self.log_dir), os.environ.get("WANDB_PROJECT", PROJECT)
        # A resume may repeat steps: they are an axis of their own, as wandb's steps only grow.
        options = dict(id=name, resume="allow", settings=wandb.Settings(console="off", quiet=True))
        options |= dict(name=self.log_dir.name, config=self.config, dir=self.log_dir)
        self._run = _started("wandb", wandb.init, project=project, **options)
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, metrics: dict, step: int, tag: str) -> None:
        self._report(self._run.log, {"step": step, **_numbers(metrics, tag)})

    def finalize(self) -> None:
        self._report(self._run.finish)


class TrackioLogger(_Remote):
    """A run of trackio."""

    def setup(self, run_id: str, parents: list[list], branched: bool) -> None:
        import trackio

        name = f"{self.log_dir.name}-{_reported(self.log_dir)}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        options = dict(name=name, resume="allow", config=self.config)
        self._trackio, self._run = trackio, _started("trackio", trackio.init, project=project, **options)

    def log_metrics(self, metrics: dict, step: int, tag: str) -> None:
        self._report(self._run.log, _numbers(metrics, tag), step=step)

    def finalize(self) -> None:
        self._report(self._trackio.finish)


def _numbers(metrics: dict, tag: str) -> dict[str, float]:
    return {f"{tag}/{name}": value for name, value in metrics.items() if isinstance(value, (int, float))}


def _reported(log_dir: Path) -> str:
    """The run's name among the reporters: that of the run whose metrics it continues (JsonlLogger)."""
    return json.loads((log_dir / RUN_FILE).read_text())["reported"]


def _started(library: str, init: Callable, **options):
    """init(**options); what the library raises becomes a UserError, which ends all ranks."""
    try:
        return init(**options)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"{library}.init failed: {reason}",
            f"Log in, set its offline mode (WANDB_MODE=offline), or leave {library} out of --report_to",
        ) from error


REPORTERS = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "trackio": TrackioLogger}
