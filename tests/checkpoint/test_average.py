"""The average of the weights: what it is, and that validation, checkpoints on any layout and exports have it."""

import pytest
import torch
from torch import nn

from ebt_megatron.checkpoint.average import WeightAverage
from ebt_megatron.parallel import setup
from ebt_megatron.session import open_run
from ebt_megatron.sharing.export import export_folder
from ebt_megatron.training.hooks import train_to_end
from ebt_megatron.training.run import Run
from tests import builders
from tests.distributed_utils import run_ranks
from tests.training.runs import DOCUMENTS, recipe_of, rows

OPTIONS = (
    "optimizer.ema_decay=0.9",
    "optimizer.lr=0.03",
    "optimizer.warmup_steps=0",
    "training.micro_batch_size=2",
    "training.validation_interval=2",
    "training.steps=4",
)
LAYOUTS = {
    "TP 2 + SP": ("parallel.tensor=2", "parallel.sequence_parallel=true"),
    "PP 2": ("parallel.pipeline=2",),
    "DP 2": ("parallel.distributed_optimizer=true",),
}


def test_it_is_the_average_of_the_weights_and_leaves_them_as_they_are():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average, expected = WeightAverage(model, 0.5), 0.0
    for step, weight in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]):
        model.weight.data.fill_(weight)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    with average.in_use():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 8.0


def train(data, output, *overrides):
    """Losses of validation, on the main rank."""
    run = Run(recipe_of(data, output, *OPTIONS, *overrides))
    train_to_end(run)
    setup.shutdown()
    return [row["validation_loss"] for row in rows(output) if "validation_loss" in row]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return builders.text_shards(tmp_path_factory.mktemp("data"), DOCUMENTS, 10, 500)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(data, folder)


def validation(run):
    batches = list(run.data["validation"])
    with torch.no_grad():
        losses = [run.objective.evaluate(run.task.sample(b, run.state.device), 2).losses[-1] for b in batches]
    return float(torch.cat([of.flatten() for of in losses]).mean())


def test_commands_use_it(data, alone, tmp_path):
    folder, losses = alone
    export_folder(folder, tmp_path / "exported")
    setup.shutdown()
    for source in (folder, tmp_path / "exported"):
        splits = [f"data.validation=[{data}/validation]"]
        with open_run(source, splits) as run:
            assert validation(run) == pytest.approx(losses[-1], rel=1e-5)
    assert train(data, tmp_path / "plain", "optimizer.ema_decay=0")[-1] != pytest.approx(losses[-1], rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_same_and_go_on_with_it(layout, data, alone, tmp_path):
    run_ranks(train, 2, data, tmp_path, *LAYOUTS[layout], "training.steps=2", "optimizer.decay_steps=4")
    losses = train(data, tmp_path)
    assert losses == pytest.approx(alone[1], rel=1e-4)
