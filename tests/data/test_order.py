"""The order of samples: every sample once an epoch, a pure function of seed and epoch, shares as asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebt_megatron.data import order
from ebt_megatron.data.order import Blend, SourceOrder


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    orders = [[Blend([[10, 20]], [], seed, True).locate(g) for g in range(60)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:30]) == sorted(orders[0][30:]) == [(0, i) for i in range(30)]
    assert orders[0][:30] != orders[0][30:]


def test_a_blend_has_the_asked_for_shares():
    blend = Blend([[100], [300]], [3, 1], 0, True)
    located = [blend.locate(g) for g in range(len(blend))]
    assert [source for source, _ in located].count(0) == 300
    assert sorted(sample for source, sample in located if source == 0) == sorted(list(range(100)) * 3)


def test_without_shuffling_sources_and_samples_follow_each_other():
    blend = Blend([[3, 2], [4]], [], 0, False, together=1)
    assert [blend.locate(g) for g in range(9)] == [(0, i) for i in range(5)] + [(1, i) for i in range(4)]


SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@given(SHARDS, st.integers(0, 8), st.integers(0, 3))
def test_a_turn_goes_group_by_group_of_shards_and_has_every_sample_once(shards, together, turn):
    source = SourceOrder(shards, together, True, 5)
    places = np.arange(source.size) + turn * source.size
    samples = source.samples(places)
    assert sorted(samples.tolist()) == list(range(source.size))
    numbers = np.searchsorted(source.first, samples, side="right") - 1
    begin = 0
    for i in range(0, len(shards), together or len(shards)):
        group = list(dict.fromkeys(numbers[begin:].tolist()))[: together or len(shards)]
        size = sum(shards[n] for n in group)
        assert set(numbers[begin : begin + size].tolist()) == set(group), f"group {i} is mixed with another"
        needed = source.shards(int(places[begin]), int(places[begin + size - 1]))
        assert set(needed[: len(group)]) == set(group) and len(needed) <= 2 * (together or len(shards))
        begin += size


@pytest.mark.parametrize("block", [4, 1 << 16])
@given(data=st.data())
def test_any_chunks_of_positions_give_the_order_of_one_by_one(block, data):
    before, order._BLOCK = order._BLOCK, block
    try:
        shards = data.draw(st.lists(SHARDS, min_size=1, max_size=3))
        weights = data.draw(
            st.one_of(st.just([]), st.lists(st.integers(1, 5), min_size=len(shards), max_size=len(shards)))
        )
        together = data.draw(st.integers(0, 3))
        blend = Blend(shards, weights, 3, True, together)
        begin, step = data.draw(st.integers(0, 3 * len(blend))), data.draw(st.integers(1, 4))
        positions = np.arange(begin, begin + 2 * len(blend), step)
        found = [None] * len(positions)
        for source, at, samples in blend.locate_all(positions):
            for i, sample in zip(at, samples, strict=True):
                found[i] = (source, sample)
        assert found == [blend.locate(int(p)) for p in positions]
        counts = np.bincount([blend.locate(p)[0] for p in range(len(blend))], minlength=len(shards))
        assert counts.tolist() == blend.share.tolist()
    finally:
        order._BLOCK = before


def test_the_samples_of_a_group_differ_from_turn_to_turn():
    source = SourceOrder([50] * 4, 2, True, 0)
    first, second = source.samples(np.arange(200)), source.samples(np.arange(200, 400))
    assert first.tolist() != second.tolist()
    assert not (first[:100] == np.sort(first[:100])).all()
