"""What test_nnscaler_facts.py lets the ranks do: `torchrun tests/helpers/facts.py FOLDER` runs every case with our Trainer, one after another."""

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

SAMPLES, GLOBAL_BATCH, STEPS = 20, 4, 12  # five steps an epoch


class Net(nn.Module):
    """forward returns the mean loss of the batch, or with `per_token` its sum over tokens, the same detached, and their number."""

    def __init__(self, dropout: float = 0.0, per_token: bool = False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.per_token = per_token

    def forward(self, batch):
        error = (self.body(batch["x"]) - batch["y"]).square().squeeze(-1)  # (B, T)
        if not self.per_token:
            return error.mean()
        loss_sum = (error * batch["valid"]).sum()
        return loss_sum, loss_sum.detach(), batch["valid"].sum()


def make_set(samples: int = SAMPLES) -> list[dict]:
    """Samples of three tokens, one to three of them valid."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 3, 4, generator=draw)
    valid = (torch.arange(3) <= torch.arange(samples)[:, None] % 3).float()
    return [{"x": x[i], "y": x[i].sum(-1, keepdim=True), "valid": valid[i]} for i in range(samples)]


def count_tokens(outputs, group):
    from trainer.args import AggregatedOutputs

    return AggregatedOutputs.aggregate(outputs, group, lambda output: output[1], lambda output: output[2])


def train(
    folder: Path,
    steps=STEPS,
    dropout=0.0,
    resume=None,
    save=None,
    reduction=("mean", "mean"),
    per_token=False,
    optimizer=None,
    **more,
):
    from trainer.args import (
        CheckpointConfig,
        ComputeConfig,
        DatasetConfig,
        LogConfig,
        ModelConfig,
        OptimizerConfig,
        ResumeOptions,
        TrainerArgs,
    )
    from trainer.trainer import Trainer

    type_, args = optimizer or (torch.optim.AdamW, {"lr": 0.01})
    data = DatasetConfig(make_set, {"samples": SAMPLES}, {"samples": 7})
    base = dict(
        compute_config=ComputeConfig(1, use_zero=True, use_end2end=True),
        model=ModelConfig(Net, {"dropout": dropout, "per_token": per_token}),
        optimizer=OptimizerConfig(
            type_,
            args,
            loss_reduction=reduction[0],
            grad_reduction=reduction[1],
            aggregate_outputs_fn=count_tokens if per_token else None,
        ),
        dataset=data,
        checkpoint=CheckpointConfig(
            save_dir=folder / "ckpt",
            every_n_train_steps=save or steps,
            resume_from=ResumeOptions(resume) if resume else None,
        ),
        log=[
            LogConfig(f"trainer.loggers.{name}", {"log_dir": folder / "log"})
            for name in ("JsonlLogger", "TensorBoardLogger")
        ],
        global_batch_size=GLOBAL_BATCH,
        max_train_steps=steps,
        seed=3,
    )
    Trainer(train_args=TrainerArgs(**{**base, **more})).run()


def reseed(trainer, state):
    torch.manual_seed(99)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in sorted(folder.rglob("*"))}


def main(out: Path) -> None:
    from trainer import checkpoint
    from trainer.args import DatasetConfig, HookMapConfig

    dist.init_process_group("gloo")  # one for all runs
    first = dist.get_rank() == 0
    saved = out / "whole" / "ckpt"
    train(out / "whole", dropout=0.3, save=1)
    before = files(saved)
    train(out / "mid", dropout=0.3, resume=saved / "0001-0007")
    train(out / "end", dropout=0.3, resume=saved / "0000-0005")
    train(
        out / "withheld",
        dropout=0.3,
        resume=saved / "0001-0007",
        hook=HookMapConfig(after_load_checkpoint=reseed),
    )
    train(out / "whole", dropout=0.3, resume="last", save=1)  # nothing left to do
    if first:
        (out / "untouched.json").write_text(json.dumps(before == files(saved)))

    train(out / "plain", save=1)
    if first:
        checkpoint.merge(out / "plain" / "ckpt" / "0001-0007", out / "merged.ckpt")
    dist.barrier()
    train(out / "from-shards", resume=out / "plain" / "ckpt" / "0001-0007")
    train(out / "from-merged", resume=out / "merged.ckpt")

    crowded = out / "crowded" / "ckpt"
    if first:
        for name in ("9999-9999", "0000-0001", "junk"):
            (crowded / name).mkdir(parents=True)
        (crowded / "0.ckpt.tmp").write_text("x")
    train(out / "crowded", steps=3)

    for loss in ("mean", "sum"):
        train(out / f"loss-{loss}", steps=1, reduction=(loss, "mean"))
    for gradient in ("mean", "sum", "per-token-mean"):
        still = (torch.optim.SGD, {"lr": 0.0})
        train(
            out / f"still-{gradient}",
            steps=1,
            reduction=("per-token-mean", gradient),
            per_token=True,
            optimizer=still,
        )
    whole_set = dict(global_batch_size=SAMPLES, micro_batch_size=1, optimizer=(torch.optim.SGD, {"lr": 1.0}))
    train(
        out / "token-mean",
        steps=1,
        reduction=("per-token-mean", "per-token-mean"),
        per_token=True,
        **whole_set,
    )
    train(out / "empty", steps=2, dataset=DatasetConfig(make_set))
    train(out / "bf16", steps=3, precision="bf16")
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(Path(sys.argv[1]))
