"""The loss of a recipe does not depend on how it is laid out over ranks."""

import pytest
import torch

from ebt_megatron.data.loader import MicroBatch
from tests import builders
from tests.cases import slow
from tests.distributed_utils import run_ranks

S1 = ("thinking.max_steps=2", "thinking.learned_steps=1")
S2 = (
    "thinking.loss=last",
    "thinking.learn_step_size=false",
    "thinking.step_size_scale=2",
    "thinking.langevin_noise=0.5",
    "thinking.replay.enabled=true",
    "thinking.replay.capacity=2",
    "model.energy_head=quadratic",
    "data.learn_from=answers",
)
FULL = ("thinking.gradient=full", "thinking.max_steps=2", "model.conditioning=adaln_sequence")
REUSE = ("thinking.reuse=true", "thinking.max_steps=2")
SEQUENCE = ("model.conditioning=time_embed_sequence",)
CONTEXT = ("thinking.initial=context", "thinking.step_rule=mirror_descent", "thinking.max_steps=2")
TRANSFORMER = ("model.architecture=baseline", "data.learn_from=answers")
RECIPES = {
    "S1": S1,
    "S2": S2,
    "full": FULL,
    "time_embed_sequence": SEQUENCE,
    "reuse": REUSE,
    "truncated on logits": ("thinking.loss=last", "thinking.gradient=truncated", "thinking.step_rule=logit_descent"),
    "mirror descent, full, regenerated": (
        "thinking.step_rule=mirror_descent",
        "thinking.langevin_noise=0.5",
        "thinking.gradient=full",
        "thinking.regenerate=5",
    ),
    "from the context": CONTEXT,
    "from the context, full": (
        *CONTEXT,
        "thinking.gradient=full",
        "thinking.regenerate=5",
        "thinking.learn_step_size=false",
    ),
    "Transformer++": TRANSFORMER,
}

QUICK, SLOW = 4, 10  # optimizer steps in the suite, and with the slow tests
LONG = ("S1", "S2", "Transformer++")  # the others take two steps, and in the suite none on four ranks

LAYOUTS = {  # name: (ranks, overrides)
    "TP 2": (2, ("parallel.tensor=2",)),
    "TP 2 + SP": (2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "DP 2": (2, ()),
    "DP 2, distributed optimizer": (2, ("parallel.distributed_optimizer=true",)),
    "PP 2": (2, ("parallel.pipeline=2",)),
    "TP 2 x DP 2": (4, ("parallel.tensor=2",)),
    "PP 4": (4, ("parallel.pipeline=4",)),
    "TP 2 + SP x PP 2": (4, ("parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.pipeline=2")),
    "PP 2 x DP 2": (4, ("parallel.pipeline=2",)),
}

SPECIAL = ("TP 2", "DP 2", "TP 2 x DP 2", "PP 4", "PP 2 x DP 2")  # what they do, others of the suite do as well


def micro_batches_of(trainer, step: int) -> list[MicroBatch]:
    """This rank's share of a global batch of eight random samples."""
    size, rank, micro = trainer.state.data_size, trainer.state.data_rank, trainer.recipe.training.micro_batch_size
    whole = torch.randint(builders.VOCAB, (8, 9), generator=torch.Generator().manual_seed(step % 3))
    micro_batches = []
    for m in range(8 // (size * micro)):
        slots = torch.arange(micro) + (m * size + rank) * micro
        answers = whole[slots] > 4 * slots[:, None]  # more of the first samples, so that ranks count differently
        micro_batches.append(MicroBatch(slots + 8 * step, whole[slots], beside={"answers": answers.long()}))
    return micro_batches


def losses_of(overrides: tuple[str, ...], steps: int) -> list[float]:
    """Losses of `steps` optimizer steps on this rank's share of random tokens."""
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.training.trainer import Trainer

    recipe = builders.small_recipe(
        "model.num_layers=4",
        "optimizer.warmup_steps=2",
        "thinking.step_size_lr_multiplier=100",
        "training.global_batch_size=8",
        "optimizer.epsilon=1e-4",
        "data.sequence_length=8",
        *overrides,
    )
    trainer = Trainer(recipe, Text(recipe, builders.VOCAB), builders.state(recipe))
    return [trainer.train_step(micro_batches_of(trainer, step), step).loss for step in range(steps)]


def several(recipes: dict[str, tuple[str, ...]], layout: tuple[str, ...], steps: int) -> dict[str, list[float]]:
    """Losses of several recipes in one set of processes; `steps` of the LONG ones."""
    from ebt_megatron.parallel.setup import shutdown

    results = {}
    for name, overrides in recipes.items():
        results[name] = losses_of((*overrides, *layout), steps if name in LONG else 2)
    shutdown()
    return results


@pytest.fixture(scope="module", params=[QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids="{} steps".format)
def single(request) -> dict[str, list[float]]:
    still = {name: (*RECIPES[name], "optimizer.lr=1e-12") for name in LONG}
    (results,) = run_ranks(several, 1, RECIPES, (), request.param)
    (unchanged,) = run_ranks(several, 1, still, (), request.param)
    for name in LONG:
        change = abs(results[name][-1] / unchanged[name][-1] - 1)
        assert change > 1e-3, f"{name} hardly changes in so many steps: comparing layouts would say little"
    return results


@pytest.mark.parametrize("layout", [slow(name) if name in SPECIAL else name for name in LAYOUTS])
def test_losses_equal_those_of_a_single_process(layout, single):
    ranks, overrides = LAYOUTS[layout]
    steps = len(single["S1"])
    recipes = {name: RECIPES[name] for name in (LONG if ranks == 4 and steps == QUICK else RECIPES)}
    if "parallel.sequence_parallel=true" in overrides:
        recipes.pop("time_embed_sequence", None)  # refused: its extra token cannot be split
    for results in run_ranks(several, ranks, recipes, overrides, steps):
        for name, losses in results.items():
            torch.testing.assert_close(
                torch.tensor(losses),
                torch.tensor(single[name]),
                rtol=1e-5,
                atol=0,
                msg=lambda text, name=name: f"{name} on {layout}: {text}",
            )
