"""Puzzles: an energy of the whole grid with exact gradients, and its baselines, in every layout."""

import random

import numpy as np
import pytest
import torch

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.data.puzzles import BLANK, Puzzle, turned
from ebt_megatron.data_prep.rules import rules_of
from ebt_megatron.data_prep.sudoku import Sudoku
from ebt_megatron.objectives.flops import sample_flops
from ebt_megatron.prediction.cells import GIVEN, cell_weights
from ebt_megatron.tasks.puzzles import Puzzles
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.cases import slow
from tests.distributed_utils import run_ranks

SIZE = 4
PUZZLE = Puzzle.sudoku(SIZE)
CPU = torch.device("cpu")


def grids(count, size=SIZE, first=0, clues=(5, 8)):
    rules = Sudoku(size)
    return torch.from_numpy(np.array([rules.puzzle(random.Random(first + i), clues) for i in range(count)])).long()


def micro_batch(count=2, counts=None):
    return MicroBatch(torch.arange(count) + 5, grids(count), counts=counts)


def recipe(*overrides):
    return builders.small_recipe(
        "data.modality=puzzles",
        f"data.sequence_length={SIZE * SIZE}",
        "model.num_query_groups=4",
        "model.vocab_multiple=8",
        "model.energy_head=quadratic",
        "thinking.step_size=2",
        *overrides,
    )


def build(*overrides, dtype=torch.float64):
    settings = recipe(*overrides)
    task = Puzzles(settings, PUZZLE)
    return settings, task, builders.build(settings, dtype, task)


# --- the energy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("gradient", ["detached", "full", "truncated"])
@pytest.mark.parametrize("rule", ["probability_descent", "logit_descent", "mirror_descent"])
def test_gradients_are_those_of_double_backward(gradient, rule, reuse):
    overrides = f"thinking.step_rule={rule}", f"thinking.reuse={str(reuse).lower()}", "thinking.langevin_noise=0.1"
    settings, task, model = build(*overrides)
    sample, plan = task.sample(micro_batch(), CPU), Plan((0.2, 0.3, 0.5), gradient)
    expected = builders.double_backward(model, settings, sample, plan)
    reference = builders.gradients(model)
    model.zero_grad()
    thought = builders.dual_stream(model, settings, sample, plan)
    assert builders.relative_error(thought.losses, expected.losses) < 1e-12
    assert builders.relative_error(thought.energies, expected.energies) < 1e-12
    ours = builders.gradients(model)
    for name, gradient_of in reference.items():
        assert gradient_of.abs().max() > 0, name
        assert builders.relative_error(ours[name], gradient_of) < 1e-10, name


def test_every_cell_sees_every_other():
    settings, task, model = build()
    sample = task.sample(micro_batch(1), CPU)
    thinker = builders.new_thinker(model, settings, sample)
    thinker.context_forward(0)
    x = thinker.descent.propose_input(0).detach().requires_grad_()
    energies = model.predict(x, thinker.key_values(constant=True), task.length, None, 0, tangent=False)
    (grad,) = torch.autograd.grad(energies[0, 0], x)
    assert (grad.abs().amax((1, 2)) > 0).all()


def test_nothing_is_learned_from_a_clue():
    settings, task, model = build()
    sample = task.sample(micro_batch(), CPU)
    asked = sample.targets.t() != GIVEN
    assert not asked.all()
    losses = builders.objective(model, settings, task).evaluate(sample, 2).losses
    assert (losses[:, asked] > 0).all() and (losses[:, ~asked] == 0).all()
    assert cell_weights(sample.targets).mean(0).tolist() == pytest.approx([1.0, 1.0])


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS = {
    "TP 2": ["parallel.tensor=2"],
    "TP 2 + SP": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "PP 2": ["parallel.pipeline=2"],
    "DP 2": [],
}
MODELS = {
    "EBT": ["thinking.reuse=true"],
    "EBT, near answers, replayed": [
        "thinking.starts_near_answer=0.5",
        "thinking.replay.enabled=true",
        "thinking.replay.capacity=1",
    ],
    "feed-forward": ["model.architecture=baseline"],
    "recurrent": ["model.architecture=baseline", "puzzles.passes=3", "thinking.starts_near_answer=0.5"],
}


def losses_of(layout):
    """Of each model, the losses of two optimizer steps on this rank's share of four puzzles."""
    from ebt_megatron.parallel.setup import shutdown
    from ebt_megatron.training.trainer import Trainer

    samples, out = grids(4), {}
    for name, overrides in MODELS.items():
        if name == "recurrent" and "parallel.pipeline=2" in layout:
            continue  # refused
        batch = "training.global_batch_size=4", "training.micro_batch_size=2", "optimizer.warmup_steps=1"
        settings = recipe(*batch, "optimizer.epsilon=1e-4", *overrides, *layout)
        trainer = Trainer(settings, Puzzles(settings, PUZZLE), builders.state(settings))
        size, rank = trainer.state.data_size, trainer.state.data_rank
        out[name] = []
        for step in range(2):
            slots = [torch.arange(2) + 2 * (m * size + rank) for m in range(2 // size)]
            batches = [MicroBatch(slot + 4 * step, samples[slot]) for slot in slots]
            out[name].append(trainer.train_step(batches, step).loss)
    shutdown()
    return out


@pytest.fixture(scope="module")
def single():
    (losses,) = run_ranks(losses_of, 1, [])
    return losses


@pytest.mark.parametrize("layout", [slow("TP 2"), "TP 2 + SP", "PP 2", slow("DP 2")])
def test_losses_equal_those_of_a_single_process(layout, single):
    for losses in run_ranks(losses_of, 2, LAYOUTS[layout]):
        assert len(losses) == len(MODELS) - (layout == "PP 2")
        for name, ours in losses.items():
            assert ours == pytest.approx(single[name], rel=1e-5), name
            assert ours[0] != pytest.approx(ours[1], rel=1e-4), f"{name} does not change"


# --- what a batch is ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 6, 9])
def test_a_turned_puzzle_is_another_puzzle(size):
    clues = {4: (5, 8), 6: (10, 14), 9: (28, 36)}[size]
    samples, rules = grids(6, size, clues=clues), Sudoku(size)
    found = turned(Puzzle.sudoku(size), samples, torch.arange(6), seed=3)
    for before, after in zip(samples, found, strict=True):
        question, answer = after.numpy()
        assert rules.problem(question, answer) == ""
        assert (question != BLANK).sum() == (before[0] != BLANK).sum() and not torch.equal(before, after)
    again = turned(Puzzle.sudoku(size), samples[2:4], torch.arange(2, 4), seed=3)
    assert torch.equal(again, found[2:4])
    assert not torch.equal(turned(Puzzle.sudoku(size), samples, torch.arange(6) + 6, seed=3), found)


@pytest.mark.parametrize(("kind", "size"), [("sudoku", 9), ("maze", 11), ("graph", 12)])
def test_the_number_of_cells_says_which_puzzle(kind, size):
    puzzle = Puzzle.of(kind, size)
    assert Puzzle.of_cells(puzzle.cells) == puzzle
    with pytest.raises(DataError, match="no puzzle has 7 cells"):
        Puzzle.of_cells(7)


@pytest.mark.parametrize("kind", ["maze", "graph"])
def test_a_turned_network_is_another(kind):
    puzzle = Puzzle.of(kind, 9)
    rules = rules_of(puzzle)
    made = [np.stack(rules.puzzle(random.Random(seed), rules.usual)) for seed in range(8)]
    samples = torch.from_numpy(np.stack(made))
    found = turned(puzzle, samples, torch.arange(8), seed=3)
    assert all(rules.problem(*sample.numpy()) == "" for sample in found)
    assert [rules.extent(q) for q in found[:, 0].numpy()] == [rules.extent(q) for q in samples[:, 0].numpy()]
    assert sum(torch.equal(a, b) for a, b in zip(samples, found, strict=True)) <= 3  # of mazes an eighth stays


def test_validation_is_not_turned():
    batch = micro_batch(2, torch.ones(2, dtype=torch.bool))
    sample = Puzzles(recipe(), PUZZLE).sample(batch, CPU)
    question, answer = batch.samples.unbind(1)
    assert torch.equal(sample.observed, question)
    assert torch.equal(sample.targets, torch.where(question == BLANK, answer - 1, GIVEN))


def test_answers_are_given_away_at_first():
    settings = recipe("puzzles.clues_given_away=1000", "puzzles.symmetries=false")
    task, tokens = Puzzles(settings, PUZZLE), grids(64)
    begin, end = (task.sample(MicroBatch(torch.arange(64) + first, tokens), CPU) for first in (0, 1000))
    given = [(s.observed != BLANK).sum(1).float().mean() for s in (begin, end)]
    assert given[0] > given[1] + 2 and given[1] == (tokens[:, 0] != BLANK).sum(1).float().mean()
    assert torch.equal(torch.where(begin.observed != BLANK, begin.observed, tokens[:, 1]), tokens[:, 1])


def test_some_samples_start_at_answers_of_which_some_cells_are_wrong():
    task = Puzzles(recipe("thinking.starts_near_answer=0.5", "puzzles.symmetries=false"), PUZZLE)
    batch = MicroBatch(torch.arange(400), grids(8).repeat(50, 1, 1))
    sample = task.sample(batch, CPU)
    begun = ~sample.first.isnan().any((1, 2))
    assert begun.float().mean() == pytest.approx(0.5, abs=0.1)
    right = (sample.first[begun].argmax(-1) == batch.samples[begun, 1] - 1).float().mean(1)
    assert right.min() < 0.4 and right.max() > 0.9 and right.mean() == pytest.approx(0.5 + 0.5 / SIZE, abs=0.05)
    part = task.sample(MicroBatch(torch.arange(7, 9), batch.samples[7:9]), CPU)
    assert torch.equal(part.first.nan_to_num(-1), sample.first[7:9].nan_to_num(-1))
    batch.counts = torch.ones(400, dtype=torch.bool)  # of validation
    assert task.sample(batch, CPU).start is None


# --- baselines ------------------------------------------------------------------------------------


def test_a_recurrent_network_reads_what_it_predicted():
    _, task, model = build("model.architecture=baseline", "puzzles.passes=3", dtype=torch.float32)
    sample = task.sample(micro_batch(), CPU)
    logits = model.trajectory(sample.observed, 4)
    assert len(logits) == 4 and not torch.allclose(logits[0], logits[1])
    losses = torch.stack([model.output.loss(z, sample.targets) for z in logits[:3]])
    assert torch.allclose(model(sample.observed, sample.targets), losses.mean(0))


def test_a_recurrent_network_may_start_near_the_answer_too():
    network = "model.architecture=baseline", "thinking.starts_near_answer=0.5"
    _, task, model = build(*network, "puzzles.passes=2", dtype=torch.float32)
    sample = task.sample(MicroBatch(torch.arange(16), grids(16)), CPU)
    begun = ~sample.first.isnan().any((1, 2))
    assert begun.any() and not begun.all()
    losses = [model(sample.observed, sample.targets, None, start) for start in (sample.start, None)]
    changed = (losses[0] - losses[1]).abs().amax(0) > 1e-5
    assert torch.equal(changed, begun)
    feed_forward = Puzzles(recipe(*network), PUZZLE)
    assert feed_forward.sample(MicroBatch(torch.arange(16), grids(16)), CPU).start is None


def test_flops_of_two_passes_are_about_those_of_two_networks():
    costs = [Puzzles(r, PUZZLE).cost() for r in (recipe(*MODELS["feed-forward"]), recipe(*MODELS["recurrent"]))]
    assert costs[1].layers == 3 * costs[0].layers
    ebt = recipe()
    assert sample_flops(ebt, Puzzles(ebt, PUZZLE).cost()) == pytest.approx(20 * costs[0].layers, rel=0.05)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.sequence_length=10", "data.sequence_length=16"),
        ("model.conditioning=adaln", "time_embed"),
        ("model.num_query_groups=2", "one group for each head"),
        ("thinking.initial=observed", "initial_std"),
        ("puzzles.passes=2 model.architecture=baseline parallel.pipeline=2", "parallel.pipeline=1"),
    ],
)
def test_settings_that_do_not_do(override, named):
    with pytest.raises(RecipeError, match=named):
        Puzzles(recipe(*override.split()), PUZZLE)
