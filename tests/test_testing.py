"""An energy of one's own is judged by double backward, on one process and on layouts; what is wrong is named."""

from pathlib import Path

import pytest
import torch

from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.testing import judge
from examples.points import joint

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
SIZES = [
    "model.num_layers=2",
    "model.num_attention_heads=2",
    "model.hidden_size=16",
    "thinking.step_size=2",
    "thinking.max_steps=3",
    "data.sequence_length=6",
]
BATCH = MicroBatch(torch.arange(4), torch.randn(4, 7, 2, generator=torch.Generator().manual_seed(0)))


class TakenForSeparable(joint.MeanEnergy):
    separable = True


class WronglyDeclared(joint.JointPoints):
    def energy_model(self, config, kernels, first, last):
        model = super().energy_model(config, kernels, first, last)
        model.__class__ = TakenForSeparable
        return model


def test_a_joint_energy_holds_on_one_process_and_on_a_layout():
    found = judge(joint.JointPoints, joint.plain_energy, BATCH, SIZES, layouts=[["parallel.tensor=2"]])
    assert len(found) == 6 and max(found.values()) < 1e-12


@pytest.mark.slow
def test_and_with_pipeline_stages():
    layouts = [["parallel.pipeline=2"], ["parallel.pipeline=2", "parallel.tensor=2"]]
    found = judge(joint.JointPoints, joint.plain_energy, BATCH, SIZES, layouts=layouts)
    assert len(found) == 9 and max(found.values()) < 1e-12


@pytest.mark.parametrize(
    ("task", "energy"),
    [
        (joint.JointPoints, lambda *given: 1.01 * joint.plain_energy(*given) ** 2),
        (WronglyDeclared, joint.plain_energy),
    ],
)
def test_what_is_wrong_is_named(task, energy):
    with pytest.raises(AssertionError, match=r"detached, one process: the gradient of \S+ is off by"):
        judge(task, energy, BATCH, SIZES, modes=["detached"])


def test_an_energy_without_a_gradient_is_no_comparison():
    with pytest.raises(AssertionError, match=r"gets no gradient, so nothing is compared"):
        judge(joint.JointPoints, lambda *given: 0 * joint.plain_energy(*given), BATCH, SIZES, modes=["detached"])


def test_the_document_shows_the_example():
    text = Path(joint.__file__).read_text()
    assert text in DOCUMENT.read_text() and len(text.splitlines()) < 60
