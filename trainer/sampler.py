"""The global sample order: a pure function of seed, epoch and position, for any world size and resume point."""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, a 64-bit hash.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where the epoch's shuffle sends each position in [0, size): a permutation, computed per element without
    a table.

    A Feistel network over the smallest even number of bits that holds `size`. A result outside the range is
    encrypted again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed], dtype=np.int64).astype(np.uint64)) + np.uint64(epoch))
        keys = [_mix(key + np.uint64(0x9E3779B97F4A7C15) * np.uint64(i + 1)) for i in range(_ROUNDS)]

        def encrypt(values):
            left, right = values >> half, values & mask
            for round_key in keys:
                left, right = right, left ^ (_mix(right + round_key) & mask)
            return (left << half) | right

        result = encrypt(positions.astype(np.uint64))
        while (outside := result >= np.uint64(size)).any():
            result[outside] = encrypt(result[outside])
    return result.astype(np.int64)


class GlobalBatchSampler:
    """Sample indices of one rank's micro-batches, for the positions from `start` to `stop` of the run.

    A global batch's positions go to the ranks micro-batch by micro-batch. A batch may end one epoch and begin
    the next, so every epoch shows every sample once and no batch is short. Only the last batch before `stop`
    lacks
    samples: its micro-batches are shorter, or empty.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
        stop: int | None = None,
    ):
        self.num_samples, self.micro_batch_size, self.accumulation = (
            num_samples,
            micro_batch_size,
            accumulation,
        )
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.start, self.stop = start, stop

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
        result = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = permute(
                offsets[epochs == epoch], self.num_samples, self.seed, int(epoch)
            )
        return result


def load_batches(
    dataset, sampler: GlobalBatchSampler, loader_args: dict, device: torch.device
) -> Iterator[dict]:
    """Yields the sampler's batches on the device. loader_args: keyword arguments of torch's DataLoader."""
    # The global generator's state must not depend on how many loaders were started.
    loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator(), **loader_args)
    for batch in loader:
        yield {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
