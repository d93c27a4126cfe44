"""A run saved on one layout goes on, with the same losses, on others; replay buffer and optimizer included."""

import pytest
import torch

from tests import builders
from tests.cases import slow
from tests.distributed_utils import run_ranks
from tests.training.test_layouts import micro_batches_of

S2 = (
    "thinking.loss=last",
    "thinking.gradient=truncated",
    "thinking.step_size_scale=2",
    "thinking.langevin_noise=0.5",
    "thinking.replay.enabled=true",
    "thinking.replay.capacity=2",
)
RECIPES = {"S2": S2, "Transformer++": ("model.architecture=baseline",)}
SAVED = (4, ("parallel.tensor=2", "parallel.pipeline=2"))
LAYOUTS = {  # (TP, PP, DP): (ranks, overrides)
    "(1, 1, 1)": (1, ()),
    "(1, 2, 2)": (4, ("parallel.pipeline=2",)),
    "(4, 1, 1)": (4, ("parallel.tensor=4", "parallel.sequence_parallel=true")),
    "(1, 1, 4), distributed optimizer": (4, ("parallel.distributed_optimizer=true", "training.micro_batch_size=1")),
}


def new_trainer(folder, name, layout):
    from ebt_megatron.checkpoint.checkpoints import Checkpoints
    from ebt_megatron.parallel.setup import shutdown
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.training.trainer import Trainer

    shutdown()
    recipe = builders.small_recipe(
        "model.num_layers=4",
        "model.num_query_groups=4",
        "optimizer.warmup_steps=2",
        "training.global_batch_size=8",
        "optimizer.epsilon=1e-4",
        "data.sequence_length=8",
        *RECIPES[name],
        *layout,
    )
    return Trainer(recipe, Text(recipe, builders.VOCAB), builders.state(recipe)), Checkpoints(folder / name, 1, {})


def go_on(trainer, first, steps=2):
    return [trainer.train_step(micro_batches_of(trainer, step), step).loss for step in range(first, first + steps)]


def save(folder, layout):
    losses = {}
    for name in RECIPES:
        trainer, checkpoints = new_trainer(folder, name, layout)
        go_on(trainer, 0, 3)
        state = trainer.objective.rank_state() if name == "S2" else None
        assert not checkpoints.save(3, trainer.model, trainer.optimizer, trainer.scheduler, {}, state)
        losses[name] = go_on(trainer, 3)
    return losses


def load(folder, layout):
    losses = {}
    for name in RECIPES:
        trainer, checkpoints = new_trainer(folder, name, layout)
        newest = checkpoints.newest_good()
        _, _, states = checkpoints.load(newest, trainer.model, trainer.optimizer, trainer.scheduler)
        if name == "S2":
            trainer.objective.load_rank_states(states)
        losses[name] = go_on(trainer, 3)
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save, SAVED[0], folder, SAVED[1])[0]


@pytest.mark.parametrize("layout", [slow(name) if name.startswith("(4") else name for name in LAYOUTS])
def test_saved_on_2_2_1_it_goes_on_elsewhere(layout, saved):
    folder, expected = saved
    ranks, overrides = LAYOUTS[layout]
    for name, losses in run_ranks(load, ranks, folder, overrides)[0].items():
        torch.testing.assert_close(losses, expected[name], rtol=1e-5, atol=0, msg=lambda text, n=name: f"{n}: {text}")
