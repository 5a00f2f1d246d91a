"""Where metrics and progress go: metrics.jsonl, TensorBoard events, and lines for a person. Only rank 0 writes."""

import json
import logging
import math
import os
from pathlib import Path

from trainer.args import LogConfig, load_type
from trainer.saver import set_aside

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def perplexity(loss: float) -> float:
    """exp(loss); infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class RunLog:
    """The metrics and messages of one run. Every rank has one; only rank 0's writes."""

    def __init__(self, configs: list[LogConfig], rank: int):
        self.is_first, self.configs, self.loggers = rank == 0, configs, []
        self._warned_of_shutdown = False

    def open(self, config: dict, step: int) -> None:
        """Opens the loggers to continue after `step`. config: the run's arguments as plain values."""
        self.loggers = [load_type(c.type)(**c.args) for c in self.configs] if self.is_first else []
        for log in self.loggers:
            log.setup(config, step)

    def write(self, step: int, metrics: dict, tag: str) -> None:
        """tag: 'train', 'val' or 'checkpoint'."""
        for log in self.loggers:
            log.log_metrics(metrics, step, tag=tag)

    def close(self) -> None:
        for log in self.loggers:
            log.finalize()

    def info(self, message: str, *values) -> None:
        if self.is_first:
            logger.info(message, *values)

    def warning(self, message: str, *values) -> None:
        if self.is_first:
            logger.warning("WARNING: " + message, *values)

    def progress(self, step: int, last_step: int, metrics: dict) -> None:
        """One line for a training step."""
        shown = " ".join(f"{key}={metrics[key]:.4g}" for key in ("lr", "gnorm", "tokens_per_second"))
        where = f"Epoch {metrics['epoch']}: {step}/{last_step}"
        self.info("%s train_loss=%.4f %s", where, metrics["train_loss"], shown)

    def save_cost(self, step: int, blocked_seconds: float, total_seconds: float, step_seconds: float) -> None:
        """What a save cost; warns once if torchrun would kill the ranks before a step and a save are over."""
        costs = {"save_blocked_seconds": blocked_seconds, "save_total_seconds": total_seconds}
        self.write(step, costs, "checkpoint")
        self.info("the save blocked training for %.2f s and took %.2f s", blocked_seconds, total_seconds)
        allowed = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
        needed = step_seconds + total_seconds
        if needed > allowed and "TORCHELASTIC_RUN_ID" in os.environ and not self._warned_of_shutdown:
            self._warned_of_shutdown = True
            self.warning(
                "a step and a save take %.0f s, but torchrun kills its ranks %.0f s after a SIGTERM: start it with "
                "--shutdown_timeout=%d (TORCH_ELASTIC_SHUTDOWN_TIMEOUT set that high silences this warning)",
                needed,
                allowed,
                math.ceil(3 * needed),
            )


class JsonlLogger:
    """Appends to `<log_dir>/metrics.jsonl`, floats at full precision, null for what is not finite (JSON has no NaN).

    A resumed run continues the file: no step twice.
    """

    def __init__(self, log_dir: str | Path):
        self.path = Path(log_dir) / METRICS

    def setup(self, config: dict, step: int = 0) -> None:
        """`step`: the last one of the run that is resumed; what the file holds beyond it is dropped, as it will come again.

        A run from step 0 is another run than the one that the folder holds: that is set aside.
        """
        if step == 0 and self.path.exists():
            set_aside(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        # A validation may be made up for twice, if the run was stopped in between.
        self._known = {(step, *json.loads(line)) for line in kept if _step(line) == step}
        if len(kept) < len(lines):
            temporary = self.path.with_suffix(".new")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.path)
        self._file = open(self.path, "a", buffering=1)

    def log_metrics(self, metrics: dict, step: int, *, tag: str | None = None) -> None:
        if (step, "step", *metrics) in self._known:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            error.filename = str(self.path)
            raise

    def finalize(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half line of a killed run


class TensorBoardLogger:
    """TensorBoard events in `log_dir`, tags train/... and val/..."""

    def __init__(self, log_dir: str | Path):
        self.log_dir = str(log_dir)

    def setup(self, config: dict, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self.log_dir, purge_step=step + 1 if step else None)

    def log_metrics(self, metrics: dict, step: int, *, tag: str | None = None) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{tag}/{name}" if tag else name, value, step)

    def finalize(self) -> None:
        self._writer.close()
