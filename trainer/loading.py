"""Loads a sampler's batches onto the device."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader


def load_batches(
    dataset, sampler: Iterable[list[int]], loader_args: dict, device: torch.device
) -> Iterator[dict]:
    """Yields the sampler's batches on the device. loader_args: keyword arguments of torch's DataLoader."""
    # The global generator's state must not depend on how many loaders were started.
    for batch in DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator(), **loader_args):
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        yield batch | {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}
