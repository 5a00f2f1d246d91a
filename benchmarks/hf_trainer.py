"""Trains with transformers' Trainer on prepared rows, and writes each step's loss, seconds and memory.

python benchmarks/hf_trainer.py MODEL_FOLDER ROWS STEPS OUTPUT.json '{"bf16": true}'     (or torchrun)

The last argument holds TrainingArguments that differ from COMMON, the dtype of the weights, or the arguments
of llama3.adapters.lora_config as `lora`. The samples come in the order of train.py, and peft's adapters start
with its values.
"""

import json
import resource
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.sampler import epoch_order  # noqa: E402

# train.py's defaults; the order is that of the rows, which are shuffled below.
COMMON = dict(learning_rate=2e-5, weight_decay=0.01, lr_scheduler_type="constant", optim="adamw_torch_fused")
COMMON |= dict(max_grad_norm=1.0, per_device_train_batch_size=1, train_sampling_strategy="sequential")
COMMON |= dict(use_cpu=not torch.cuda.is_available())
QUIET = dict(save_strategy="no", logging_steps=1, disable_tqdm=True, report_to="none")


class Notes(TrainerCallback):
    """Notes when each step ends, and its loss. A step's seconds include loading and logging, as in ours."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_train_begin(self, args, state, control, **_):
        self.ends.append(time.perf_counter())

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available() and not args.use_cpu:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def samples(path: str, count: int) -> datasets.Dataset:
    """The first samples of train.py's order, which goes on with another one in each epoch."""
    rows = datasets.load_from_disk(f"{path}/train").with_format("numpy").select_columns(["input_ids"])
    orders = [epoch_order(len(rows), 0, epoch) for epoch in range(1 + count // len(rows))]
    chosen = rows.select(np.concatenate(orders)[:count])
    return chosen.map(lambda row: {"input_ids": row["input_ids"], "labels": row["input_ids"]})


def with_adapter(model, folder: str, lora: dict):
    """peft's own model, whose adapter starts with the values that train.py gives it."""
    import peft

    from llama3.adapters import PEFT_PREFIX, lora_config
    from llama3.model import Llama

    adapted, ours = peft.get_peft_model(model, lora_config(**lora)), Llama(folder, lora=lora)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix(PEFT_PREFIX).replace(".default.", ".")
            parameter.data = ours.initial_values(name, 0, parameter.numel()).view_as(parameter)
    return adapted


def main(model_folder: str, rows: str, steps: str, output: str, settings: str = "{}") -> None:
    options = {**COMMON, **json.loads(settings)}
    dtype, lora = getattr(torch, options.pop("dtype", "float32")), options.pop("lora", None)
    args = TrainingArguments(output_dir=f"{output}.d", max_steps=int(steps), **options, **QUIET)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, attn_implementation="sdpa")
    model = with_adapter(model, model_folder, lora) if lora else model
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    train_set, notes = samples(rows, batch * args.max_steps), Notes()
    Trainer(model=model, args=args, train_dataset=train_set, callbacks=[notes]).train()
    on_cuda, resident = args.device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if on_cuda else resident
    memory = torch.tensor(peak / 2**30, dtype=torch.float64, device=args.device)
    if dist.is_initialized():
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
    seconds, tokens = np.diff(notes.ends).tolist(), batch * len(train_set[0]["input_ids"])
    if args.process_index == 0:
        measured = zip(notes.losses, seconds, strict=True)
        found = [dict(train_loss=loss, step_seconds=s, tokens_per_second=tokens / s) for loss, s in measured]
        Path(output).write_text(json.dumps([dict(row, peak_memory_gib=memory.item()) for row in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
