"""Adapts a frozen Llama by LoRA, through peft: its layers, merging them, and peft's own folder.

Shapes: a target's weight W (out, in), its adapter's A (r, in) and B (out, r); together W + scale * B @ A.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import nn

from llama3 import assets
from llama3.export import exported
from llama3.presets import LORA_TARGETS, SMOLLM2

ADAPTER = "default"  # peft's name of a model's first adapter
PEFT_PREFIX = "base_model.model."  # in front of the names in peft's files


class LoraLinear(peft.tuners.lora.Linear):
    """peft's layer for one adapter without dropout, which passes over its output twice instead of thrice."""

    def forward(self, x):
        A, B = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        rows = x.flatten(0, -2)
        inner = F.linear(rows, A) * self.scaling[ADAPTER]  # (rows, r)
        return torch.addmm(self.base_layer(rows), inner, B.T).view(*x.shape[:-1], -1)


def lora_config(lora_rank: int, lora_alpha: int, lora_targets: str, **more) -> peft.LoraConfig:
    """lora_targets: 'all-linear', or the names of linear layers with commas between them."""
    names = LORA_TARGETS if lora_targets == "all-linear" else lora_targets.split(",")
    return peft.LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=sorted(names), **more)


def adapt(model: nn.Module, config: peft.LoraConfig) -> None:
    """Freezes the model and adds the adapter, in place."""
    config._register_custom_module({nn.Linear: LoraLinear})
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def merged(
    weights: Iterable, adapter: dict[str, Callable], scale: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, W + scale * B @ A) for the pairs (name, W), one at a time; W itself has no adapter there.

    adapter: the name of each of its tensors -> a function that reads it.
    """
    for name, weight in weights:
        A, B = (adapter.get(name.removesuffix("weight") + f"lora_{letter}.weight") for letter in "AB")
        yield name, torch.addmm(weight.float(), B(), A(), alpha=scale) if A else weight


def export_adapter(
    folder: Path, model_id: str, lora: dict, shapes: dict, tensors: Iterable, writer: Callable
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as peft itself does.

    shapes, tensors and writer: as for `export_hf`.
    """
    local = model_id == SMOLLM2 or Path(model_id).is_dir()
    base = str(assets.model_folder(model_id).resolve()) if local else model_id
    specs = {PEFT_PREFIX + name: (torch.float32, shape) for name, shape in shapes.items()}
    pairs = ((PEFT_PREFIX + name, tensor) for name, tensor in tensors)
    with exported(folder, "adapter_model.safetensors", specs, pairs, writer) as new:
        more = dict(base_model_name_or_path=base, task_type="CAUSAL_LM", inference_mode=True)
        lora_config(**lora, **more).save_pretrained(new)
