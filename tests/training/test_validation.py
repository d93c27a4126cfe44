"""Every validation sample counts once, whatever the layout."""

import pytest

from tests import builders
from tests.builders import small_recipe, text_shards
from tests.distributed_utils import run_ranks
from tests.training.runs import DOCUMENTS

COUNTS = (1, 2, 3, 4, 5, 7, 11, 12, 13, 19, 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS[:40], 10, 500, vocab=300, validation_fraction=0.2)


def _losses(data, layouts):
    """Per layout, per number of samples: losses, energies, the targets' entropy, and right and changed answers."""
    from ebt_megatron.data.loader import Loader
    from ebt_megatron.objectives.validation import validate
    from ebt_megatron.parallel import setup
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.training.trainer import Trainer

    out = {}
    for layout, counts in layouts.items():
        recipe = small_recipe(
            f"data.train=[{data}/train]",
            f"data.validation=[{data}/validation]",
            *layout,
            "training.global_batch_size=12",
            "training.micro_batch_size=3",
        )
        trainer = Trainer(recipe, Text(recipe, 300), builders.state(recipe))
        loader = Loader(recipe, "validation", trainer.state.data_rank, trainer.state.data_size)
        steps = 2 if recipe.model.architecture == "ebt" else 1
        for count in counts:
            recipe.training.validation_samples = count
            result = validate(trainer.objective, loader, steps)
            assert result.positions == 10 * count
            values, measures = [*result.losses.tolist(), *result.energies.tolist()], result.measures
            values += [measures["unigram_entropy"], *measures.get("accuracy", ()), *measures.get("changed", ())[1:]]
            out[recipe.model.architecture, layout[1:], count] = values
        setup.shutdown()
    return out


EBT, TRANSFORMER = "model.architecture=ebt", "model.architecture=baseline"
TENSOR, PIPELINE, FEW = "parallel.tensor=2", "parallel.pipeline=2", (2, 5, 20)


def test_the_loss_is_the_same_on_1_2_and_4_ranks_for_1_to_20_samples(data):
    (expected,) = run_ranks(_losses, 1, data, {(EBT,): COUNTS, (TRANSFORMER,): COUNTS})
    assert len({tuple(v) for v in expected.values()}) == 2 * len(COUNTS)
    for ranks, layouts in (
        (2, {(EBT,): COUNTS, (TRANSFORMER,): FEW, (EBT, TENSOR): FEW, (EBT, PIPELINE): FEW}),
        (4, {(EBT,): COUNTS, (TRANSFORMER, PIPELINE): FEW}),
    ):
        for answer in run_ranks(_losses, ranks, data, layouts):
            for (architecture, layout, count), values in answer.items():
                wanted = expected[architecture, (), count]
                assert values == pytest.approx(wanted, rel=1e-6, abs=1e-6), (ranks, architecture, layout, count)
