"""Where metrics and progress go: metrics.jsonl, TensorBoard events, lines for a person; from rank 0."""

import json
import logging
import math
import os
from pathlib import Path

from trainer.folders import contents, set_aside

logger = logging.getLogger(__name__)


def perplexity(loss: float) -> float:
    """exp(loss); infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def progress_line(step: int, last_step: int, metrics: dict) -> str:
    """What a person sees of a training step."""
    shown = " ".join(f"{key}={metrics[key]:.4g}" for key in ("lr", "gnorm", "tokens_per_second"))
    line = f"Epoch {metrics['epoch']}: {step}/{last_step} train_loss={metrics['train_loss']:.4f} {shown}"
    if skipped := metrics.get("skipped_samples"):
        line += f"\nWARNING: step {step} is not finite: its update is skipped; its samples were {skipped}"
    return line


def log_save_cost(step_seconds: float, blocked_seconds: float, total_seconds: float) -> None:
    """Says what a save cost, and warns if torchrun would kill the ranks before a step and a save are over."""
    logger.info("the save blocked training for %.2f s and took %.2f s", blocked_seconds, total_seconds)
    needed = step_seconds + total_seconds
    allowed = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    if needed > allowed and "TORCHELASTIC_RUN_ID" in os.environ:
        logger.warning(
            "WARNING: a step and a save take %.0f s, but torchrun kills its ranks %.0f s after SIGTERM: use "
            "torchrun --shutdown_timeout=%d (a TORCH_ELASTIC_SHUTDOWN_TIMEOUT as high silences this)",
            *(needed, allowed, math.ceil(3 * needed)),
        )


class JsonlLogger:
    """Appends to `<log_dir>/metrics.jsonl`: floats at full precision, null for what is not finite.

    A resumed run continues the file: no step comes twice.
    """

    def __init__(self, log_dir: str | Path):
        self.path = Path(log_dir) / "metrics.jsonl"

    def setup(self, run_id: str, parents: list[list], branched: bool) -> None:
        """Opens the file for this run, whose parents are [run, step] of each run before it, up to which step.

        Another run's folder is set aside. Lines after the resumed step are dropped, because they come again;
        branched: other ones come in their place, so the file is set aside as it was.
        """
        folder, step = self.path.parent, parents[-1][1] if parents else 0
        if self.path.exists() and not (parents and self._continues(*parents[-1])):
            set_aside(folder, contents(folder))
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        # A resume may repeat a validation that was logged but not recorded with the checkpoint.
        self._known = {(step, *json.loads(line)) for line in kept if _step(line) == step}
        if len(kept) < len(lines):
            temporary = self.path.with_suffix(".new")
            temporary.write_text("".join(line + "\n" for line in kept))
            if branched:
                set_aside(folder, [self.path], "metrics that this run does not continue")
            os.replace(temporary, self.path)
        (folder / "run.json").write_text(json.dumps({"run": run_id, "parents": parents}))
        self._file = open(self.path, "a", buffering=1)

    def _continues(self, run: str | None, step: int) -> bool:
        """Did the run that wrote the file come by that step of that run? True if nobody knows."""
        try:
            writer = json.loads((self.path.parent / "run.json").read_text())
            return run == writer["run"] or any(run == own and step <= to for own, to in writer["parents"])
        except (OSError, ValueError, KeyError, TypeError):
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
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{tag}/{name}", value, step)

    def finalize(self) -> None:
        self._writer.close()
