"""The global sample order."""

import numpy as np
import pytest

from dataset.sampler import GlobalBatchSampler, epoch_order


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_every_epoch_is_a_permutation_of_its_own(size, seed):
    orders = [epoch_order(size, seed, epoch).tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 1000 or len(set(map(tuple, orders))) == 5


def test_seeds_have_orders_of_their_own_that_never_change():
    assert len({tuple(epoch_order(100, seed, 0)) for seed in (0, 1, 2, 2**32, 2**40)}) == 5
    assert epoch_order(10, 0, 0).tolist() == ORDER  # a resume with a newer NumPy continues the same order


ORDER = [8, 2, 4, 3, 6, 0, 9, 1, 5, 7]


def global_batches(world, micro, accumulation, **options):
    """The sets of samples that the first batches hold, put together from every rank."""
    ranks = [
        iter(GlobalBatchSampler(30, micro, accumulation, rank, world, **options)) for rank in range(world)
    ]
    return [sorted(i for rank in ranks for _ in range(accumulation) for i in next(rank)) for _ in range(9)]


SPLITS = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (2, 4, 1), (4, 2, 1), (4, 1, 2), (8, 1, 1)]


@pytest.mark.parametrize("world, micro, accumulation", SPLITS)
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
