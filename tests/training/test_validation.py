"""Every validation sample counts once, whatever the layout."""

import pytest

from tests.builders import small_recipe, text_shards
from tests.distributed_utils import run_ranks
from tests.training.runs import DOCUMENTS

COUNTS = range(1, 21)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS[:40], 10, 500, vocab=300, validation_fraction=0.2)


def _losses(data, counts, overrides):
    from ebt_megatron.data.loader import Loader
    from ebt_megatron.evaluation.perplexity import validate
    from ebt_megatron.model.build import SampleShape
    from ebt_megatron.training.trainer import Trainer

    out, trainer = {}, None
    for count in counts:
        recipe = small_recipe(f"data.train=[{data}/train]", f"data.validation=[{data}/validation]", *overrides,
                              "training.global_batch_size=12", "training.micro_batch_size=3",
                              f"training.validation_samples={count}")  # fmt: skip
        state = (trainer := trainer or Trainer(recipe, SampleShape(vocab_size=300))).state
        loader = Loader(recipe, "validation", state.data_rank, state.data_size)
        steps = 2 if recipe.model.architecture == "ebt" else 1
        result = validate(trainer.objective, loader, steps, 300, state.data_group, state.pipeline_group)
        assert result.positions == 10 * count == int(result.counts.sum())
        out[count] = [*result.losses.tolist(), *result.energies.tolist(), result.unigram_entropy()]
    return out


LAYOUTS = [(2, ()), (4, ()), (2, ("parallel.tensor=2",)), (2, ("parallel.pipeline=2",)), (4, ("parallel.pipeline=2",))]


@pytest.mark.parametrize("architecture", ["ebt", "transformer"])
def test_the_loss_is_the_same_on_1_2_and_4_ranks_for_1_to_20_samples(architecture, data):
    overrides = (f"model.architecture={architecture}",)
    (expected,) = run_ranks(_losses, 1, data, COUNTS, overrides)
    assert len({v[0] for v in expected.values()}) == len(COUNTS)
    for ranks, layout in LAYOUTS:
        counts = (1, 2, 5, 20) if layout else COUNTS
        for answer in run_ranks(_losses, ranks, data, counts, (*overrides, *layout)):
            for count, values in answer.items():
                assert values == pytest.approx(expected[count], rel=1e-6), (ranks, layout, count)
