"""Noise is standard normal, and a pure function of seed, sample, position, stream and column."""

import torch

from ebt_megatron.kernels import noise


def drawn(keys, seed, column_offset, count):
    y = torch.zeros(len(keys), count)
    noise.add_noise_(y, keys, column_offset, 1.0, seed)
    return y


def keys(samples=4, positions=8, stream=0):
    return noise.row_keys(torch.arange(samples) + 100, torch.arange(positions), stream)


def normal(**kwargs):
    return drawn(keys(**kwargs), 7, 0, 4096).double()


def test_moments():
    z = normal(samples=16, positions=16).flatten()
    count = z.numel()
    assert abs(z.mean()) < 5 / count**0.5
    assert abs(z.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / count) ** 0.5


def test_neighbours_are_independent():
    z = normal(samples=8, positions=8).view(8, 8, -1)  # position, sample, column
    bound = 5 / z.numel() ** 0.5
    assert abs((z[..., 1:] * z[..., :-1]).mean()) < bound
    assert abs((z[1:] * z[:-1]).mean()) < 1.1 * bound
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 1.1 * bound
    other_stream = normal(samples=8, positions=8, stream=1).view_as(z)
    other_seed = drawn(keys(8, 8), 8, 0, 4096).double().view_as(z)
    assert abs((z * other_stream).mean()) < bound
    assert abs((z * other_seed).mean()) < bound
    assert not torch.equal(z, other_stream) and not torch.equal(z, other_seed)


def test_a_slice_of_columns_is_the_slice_of_the_whole():
    whole = drawn(keys(), 7, 0, 300)
    assert torch.equal(drawn(keys(), 7, 100, 50), whole[:, 100:150])


def test_rows_stand_for_themselves():
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(keys()[order], 7, 0, 64), drawn(keys(), 7, 0, 64)[order])


def test_rows_are_in_token_order():
    by_sample = noise.row_keys(torch.tensor([102]), torch.tensor([5]), 0)
    assert keys().view(8, 4)[5, 2] == by_sample


def test_adding_is_tiled_without_seams():
    y = torch.ones(40, 20000)
    noise.add_noise_(y, keys(5, 8), 3, 0.5, 7)
    assert torch.allclose(y, 1 + 0.5 * drawn(keys(5, 8), 7, 3, 20000))
