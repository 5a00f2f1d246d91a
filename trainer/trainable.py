"""The base class of models: all that a Trainer of either engine asks of one."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn


class TrainableModel(nn.Module):
    """A model that a Trainer shards, fills with weights, trains and saves.

    Parameters may start on the meta device. Those that require no gradient are frozen: they are kept in the
    computation's precision, only they have weight files then, and checkpoints hold the others alone.

    layer_class: the class of the repeated layers, which are sharded, recomputed and compiled one by one; None
    if no layer repeats.
    traced_class: the dotted name of the class with the same parameters and loss that nnScaler can trace.
    """

    layer_class: ClassVar[type[nn.Module] | None] = None
    traced_class: ClassVar[str | None] = None

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Return sums over the batch, each a scalar.

        loss_sum: the loss, which is differentiated, summed over the batch's targets. targets: their number.
        A further entry `<metric>_sum` is divided by the targets and logged as `<metric>`.
        batch: tensors by name, and `num_tokens`, the tokens in it without padding.
        """
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated layers, in order."""
        if self.layer_class is None:
            return []
        return [module for module in self.modules() if isinstance(module, self.layer_class)]

    @property
    def sharded_alone(self) -> list[nn.Module]:
        """Other large modules, each gathered alone, and not for backward: their gradients do not need it."""
        return []

    @property
    def longest_sample(self) -> int | None:
        """The number of tokens that the model was made for; None if it does not matter."""
        return None

    def compile_loss(self, compile: Callable) -> None:
        """Replace what the loss computes elementwise by `compile` of it."""

    def checkpoint_name(self, name: str) -> str:
        """Return the name in checkpoints of the parameter with that name."""
        return name

    def weight_files(self) -> dict[str, Path] | None:
        """Return the safetensors file of each parameter by its checkpoint name; None: train from scratch."""
        return None

    def initial_values(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return elements [start, stop) of the fresh parameter, flattened, in fp32: of seed and name alone.

        None: the parameter keeps the values that it was made with.
        """
        return None

    def flops_per_token(self, batch: dict) -> float | None:
        """Return the floating-point operations of a training step a token, for MFU; None: unknown."""
        return None
