"""One rank's batches, made ahead in a thread and moved to the device."""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

from trainer.sampler import GlobalBatchSampler

BATCHES_AHEAD = 4


def load_batches(
    dataset, sampler: GlobalBatchSampler, loader_args: dict, device: torch.device
) -> Iterator[dict]:
    """Yields the sampler's batches on the device. loader_args: keyword arguments of torch's DataLoader."""
    # The global generator's state must not depend on how many loaders were started.
    loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator(), **loader_args)
    for batch in _made_ahead(loader):
        yield {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }


def _made_ahead(items: Iterable, count: int = BATCHES_AHEAD) -> Iterator:
    """The same items in order; a thread makes up to `count` of them before they are needed."""
    iterator, end, thread = iter(items), object(), ThreadPoolExecutor(1, "data")
    try:
        made = collections.deque(thread.submit(next, iterator, end) for _ in range(count))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # a consumer that stops early need not wait
