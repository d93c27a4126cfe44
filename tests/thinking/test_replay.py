"""The replay buffer: one replayed sample for two fresh ones, the same whatever the layout."""

import torch

from ebt_megatron.thinking.replay import ReplayBuffer, reshard, stack_start


def filled(tensor_rank=0, tensor_size=1, slots=(0, 1, 2, 3)):
    buffer = ReplayBuffer(2, seed=1)
    for slot in slots:
        for n in range(3):
            whole = torch.arange(12.0).view(3, 4) + 100 * slot + 1000 * n
            part = whole.chunk(tensor_size, -1)[tensor_rank]
            buffer.add(slot, 10 * n + slot, torch.tensor([slot, n]), torch.tensor([n, slot]), part)
    return buffer


def test_every_second_sample_has_a_slot():
    assert [ReplayBuffer.slot_of(s) for s in range(6)] == [0, None, 1, None, 2, None]


def test_the_oldest_entry_of_a_full_slot_goes():
    assert [entry.sample_id for entry in filled().slots[2]] == [12, 22]


def test_what_is_drawn_depends_on_slot_and_iteration_only():
    a, b = filled(), filled(slots=(3, 1))
    draws = [[buffer.draw(3, i).sample_id for i in range(20)] for buffer in (a, b)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) == 2
    assert a.draw(9, 0) is None


def test_each_use_has_noise_of_its_own():
    buffer = filled()
    entry = buffer.draw(0, 0)
    first = ReplayBuffer.replay_id(entry)
    buffer.update(entry, entry.prediction + 1)
    assert ReplayBuffer.replay_id(entry) != first


def test_resharding_gives_what_the_new_layout_would_have_kept():
    old = [{"tensor_rank": r, "replay": filled(r, 2).state_dict()} for r in range(2)]
    for rank in range(4):
        content = reshard(old, rank, 4, {1, 3})
        buffer = ReplayBuffer(2, seed=1)
        buffer.load_state_dict(content)
        expected = filled(rank, 4, slots=(1, 3))
        assert set(buffer.slots) == {1, 3}
        for slot, entries in expected.slots.items():
            for a, b in zip(entries, buffer.slots[slot], strict=True):
                torch.testing.assert_close(a.prediction, b.prediction)
                assert (a.sample_id, a.uses) == (b.sample_id, b.uses)


def test_resharding_leaves_latents_whole():
    """Every rank has them whole."""
    values = torch.arange(12.0).view(3, 4)
    entry = {"sample_id": 1, "uses": 0, "observed": values, "targets": values, "prediction": values + 1}
    old = [{"tensor_rank": r, "replay": {"1": [entry]}} for r in range(2)]
    for rank, size in ((0, 1), (1, 2), (3, 4)):
        assert torch.equal(reshard(old, rank, size, {1})["1"][0]["prediction"], values + 1)


def test_fresh_samples_start_from_noise_and_replayed_ones_from_their_prediction():
    buffer = filled()
    start = stack_start(2, [buffer.draw(0, 0), buffer.draw(1, 0)])
    assert start.shape == (3, 4, 4)
    assert start[:, :2].isnan().all() and not start[:, 2:].isnan().any()
