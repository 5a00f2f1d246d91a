"""The cases of test_nnscaler_facts.py: `torchrun tests/helpers/facts.py FOLDER` runs them in turn."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dataset.sampler import GlobalBatchSampler
from trainer import args as interface
from trainer.checkpoint import Checkpoint
from trainer.loggers import JsonlLogger, TensorBoardLogger
from trainer.trainable import TrainableModel
from trainer.trainer import Trainer


class Net(TrainableModel):
    """Predicts the sum of four numbers, for each of T tokens; the invalid tokens have no target."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, batch):
        x = batch["x"].to(self.body[0].weight.dtype)  # (B, T, 4)
        error = (self.body(x).squeeze(-1) - x.sum(-1)).square()  # (B, T)
        return {"loss_sum": (error * batch["valid"]).sum(), "targets": batch["valid"].sum()}


def make_set(samples: int = 20) -> list[dict]:
    """Samples of three tokens, one to three of them valid."""
    x = torch.randn(samples, 3, 4, generator=torch.Generator().manual_seed(5))
    valid = (torch.arange(3) <= torch.arange(samples)[:, None] % 3).float()
    return [{"x": x[i], "valid": valid[i]} for i in range(samples)]


def collate(samples: list[dict]) -> dict:
    """A batch of one sample, without targets if there is none."""
    sample = samples[0] if samples else {"x": torch.zeros(3, 4), "valid": torch.zeros(3)}
    return {"x": sample["x"][None], "valid": sample["valid"][None], "num_tokens": 3 * len(samples)}


def train(folder: Path, steps=12, dropout=0.0, resume=None, **more):
    logs = (JsonlLogger, TensorBoardLogger)
    base = dict(global_batch_size=4, max_train_steps=steps, seed=3)  # five steps an epoch
    base |= dict(
        compute_config=interface.ComputeConfig(1, dist.get_world_size()),
        model=interface.ModelConfig(Net, {"dropout": dropout}),
        optimizer=interface.OptimizerConfig(torch.optim.AdamW, {"lr": 0.01}),
        dataset=interface.DatasetConfig(make_set, {}, {"samples": 7}),
        dataset_sampler=interface.DatasetSamplerConfig(GlobalBatchSampler),
        dataloader=interface.DataloaderConfig({"collate_fn": collate}),
        checkpoint=interface.CheckpointConfig(folder / "ckpt", 1, None, resume),  # every step
        log=[interface.LogConfig(log, {"log_dir": folder / "log"}) for log in logs],
    )
    Trainer(train_args=interface.TrainerArgs(**{**base, **more})).run()


def main(out: Path) -> None:
    first, whole, plain = dist.get_rank() == 0, out / "whole" / "ckpt", out / "plain" / "ckpt"
    train(out / "whole", dropout=0.3)
    train(out / "plain")
    if first:
        Checkpoint.open(whole / "0001-0007").merge(out / "dropout.ckpt")
        Checkpoint.open(plain / "0001-0007").merge(out / "merged.ckpt")
        for name in ("9999-9999", "0000-0001", "junk"):
            (out / "crowded" / "ckpt" / name).mkdir(parents=True)
    dist.barrier()

    def files():
        return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in out.glob("whole/**/*")}

    before = files()
    train(out / "mid", dropout=0.3, resume=whole / "0001-0007")
    train(out / "end", dropout=0.3, resume=whole / "0000-0005")
    train(out / "withheld", dropout=0.3, resume=out / "dropout.ckpt")  # a merged file has no random state
    train(out / "whole", dropout=0.3, resume=out / "whole" / "ckpt" / "last")  # nothing left to do
    if first and before == files():
        (out / "untouched").touch()
    train(out / "from-shards", resume=plain / "0001-0007")
    train(out / "from-merged", resume=out / "merged.ckpt")
    train(out / "crowded", steps=3)
    descent = interface.OptimizerConfig(torch.optim.SGD, {"lr": 1.0})
    train(out / "one-step", steps=1, optimizer=descent, global_batch_size=20)
    train(out / "empty", steps=2, dataset=interface.DatasetConfig(make_set))
    train(out / "bf16", steps=3, precision="bf16")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # one for all runs
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
