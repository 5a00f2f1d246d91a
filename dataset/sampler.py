"""The global sample order, a pure function of seed, epoch and position, and each rank's batches from it."""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's shuffled samples. NumPy promises that RandomState never changes."""
    return np.random.RandomState([seed % 2**32, seed >> 32, epoch]).permutation(num_samples)


@dataclass
class GlobalBatchSampler:
    """Sample indices of one rank's micro-batches, for the positions from `start` to `stop` of the run.

    A global batch's positions go to the ranks micro-batch by micro-batch. Epochs follow each other without a
    gap, so every epoch shows every sample once and no batch is short. Only the last batch before `stop` lacks
    samples: its micro-batches are shorter, or empty.
    """

    num_samples: int
    micro_batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while self.stop is None or position < self.stop:
            for _ in range(self.accumulation):
                mine = position + self.rank * self.micro_batch_size + np.arange(self.micro_batch_size)
                yield self.indices(mine if self.stop is None else mine[mine < self.stop]).tolist()
                position += self.micro_batch_size * self.world_size

    def __len__(self) -> int:
        """The number of micro-batches; there is no end without `stop`."""
        return sys.maxsize if self.stop is None else sum(1 for _ in self)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices at these positions of the run."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        if not self.shuffle:
            return offsets
        orders = (epoch_order(self.num_samples, self.seed, int(epoch)) for epoch in epochs)
        return np.array([order[offset] for order, offset in zip(orders, offsets, strict=True)], np.int64)
