"""The global sample order."""

import time

import numpy as np
import pytest

from trainer.sampler import GlobalBatchSampler, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_every_epoch_is_a_permutation(size, seed):
    for epoch in (0, 1, 5):
        assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_looks_random():
    size = 20000
    order = permute(np.arange(size), size, 3, 0)
    # Fixed points and neighbours that stay neighbours: about one of each is expected of a random permutation, two for the latter.
    assert (order == np.arange(size)).sum() < 8
    assert (np.abs(np.diff(order)) == 1).sum() < 12
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03
    halves = np.bincount(order[: size // 2] * 10 // size, minlength=10)
    assert halves.min() > 900 and halves.max() < 1100


def global_batches(world, micro, accumulation, **options):
    """The sets of samples that the first batches hold, put together from every rank."""
    ranks = [
        iter(GlobalBatchSampler(30, micro, accumulation, rank, world, **options)) for rank in range(world)
    ]
    return [sorted(i for rank in ranks for _ in range(accumulation) for i in next(rank)) for _ in range(9)]


@pytest.mark.parametrize(
    "world, micro, accumulation",
    [(1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1), (4, 2, 1), (4, 1, 2), (8, 1, 1)],
)
def test_any_world_size_sees_the_same_global_batches(world, micro, accumulation):
    assert global_batches(world, micro, accumulation, seed=4) == global_batches(1, 8, 1, seed=4)


def test_every_sample_comes_once_an_epoch_across_batch_borders():
    drawn = GlobalBatchSampler(30, 1, seed=2).indices(np.arange(90))
    for epoch in range(3):
        assert sorted(drawn[epoch * 30 : epoch * 30 + 30]) == list(range(30))


def test_any_position_can_be_resumed():
    whole = iter(GlobalBatchSampler(30, 2, 2, seed=1))
    sequence = [next(whole) for _ in range(40)]
    for step in (1, 7, 13):
        later = iter(GlobalBatchSampler(30, 2, 2, seed=1, start=step * 4))
        assert [next(later) for _ in range(8)] == sequence[step * 2 : step * 2 + 8]


def test_the_last_batch_before_the_end_lacks_what_is_not_there():
    ranks = [list(GlobalBatchSampler(10, 2, 1, rank, 2, stop=10)) for rank in range(2)]
    assert [len(batch) for rank in ranks for batch in rank] == [2, 2, 2, 2, 2, 0]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(10))


def test_resuming_in_a_hundred_million_samples_costs_nothing():
    near, far = (GlobalBatchSampler(100_000_000, 4, start=start) for start in (0, 99_999_990))
    next(iter(near))

    def seconds(sampler):
        began = time.perf_counter()
        for _ in range(50):
            next(iter(sampler))
        return time.perf_counter() - began

    assert seconds(far) < 20 * seconds(near)  # not a hundred million times
    assert len(set(np.concatenate([next(iter(far)), next(iter(near))]))) == 8
