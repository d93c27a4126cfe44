"""The planner: sizes it can check by hand, and answers that move the right way."""

import pytest

from ebt_megatron.config import RecipeError, load_recipe
from ebt_megatron.tasks import task_class
from ebt_megatron.tools.hardware import Hardware
from ebt_megatron.tools.plan import estimate, verdict

HARDWARE = Hardware(tflops=100, bandwidth=100, network=10)


def recipe(*overrides):
    return load_recipe(
        None, ["model.size=xxs", "training.global_batch_size=64", "training.micro_batch_size=4", *overrides]
    )


def test_parameters_are_those_of_the_model():
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.tasks.build import build_model
    from ebt_megatron.tasks.text import Text

    r = recipe("model.conditioning=none")
    initialize(r.parallel, 0)
    built = sum(p.numel() for p in build_model(r, Text(r, 1000)).parameters() if p.dim() == 2)
    assert Text(r, 1000).cost().parameters == built


@pytest.mark.parametrize("architecture", ["ebt", "baseline"])
def test_so_are_those_of_a_model_of_pictures(architecture):
    from ebt_megatron.parallel.setup import initialize
    from ebt_megatron.tasks.build import build_model
    from ebt_megatron.tasks.images import Images

    r = recipe(
        "data.modality=images",
        "data.sequence_length=16",
        "model.conditioning=none",
        "model.num_layers=2",
        f"model.architecture={architecture}",
    )
    initialize(r.parallel, 0)
    task = Images.of_size(r, 0, 48)
    named = build_model(r, task).named_parameters()
    built = sum(p.numel() for name, p in named if p.dim() == 2 and not name.startswith(("final", "condition")))
    assert task.cost().parameters == built


def planned(r, vocab_size, gpus, channels=768):
    return estimate(r, task_class(r.data.modality).of_size(r, vocab_size, channels), gpus, HARDWARE)


def test_a_recipe_of_pictures_that_are_told_something_is_planned_without_data():
    """And a DiT that learns its variance predicts two numbers for each of a patch."""
    pictures = ("data.modality=images", "data.sequence_length=16", "model.conditioning=none")
    told = planned(recipe(*pictures, "images.classes=true"), 1000, 8)
    assert told.parameters == planned(recipe(*pictures, "images.captions=true"), 1000, 8).parameters
    plain, both = (
        planned(recipe(*pictures, "model.architecture=baseline", f"images.learn_sigma={learned}"), 1000, 8)
        for learned in ("false", "true")
    )
    assert both.parameters > plain.parameters


def test_pipeline_stages_divide_weights_and_add_a_bubble():
    one, two = (planned(recipe(f"parallel.pipeline={n}"), 1000, 8) for n in (1, 2))
    assert one.bubble == pytest.approx(0) and 0 < two.bubble < 0.5
    assert two.weight_bytes == pytest.approx(one.weight_bytes / 2)
    assert one.pipeline_traffic == 0 < two.pipeline_traffic


def test_learning_drawn_steps_saves_time():
    """10 C instead of 15 C with the context's 3, but for the vocabulary."""
    two = ("thinking.max_steps=2", "thinking.reuse=true", "data.sequence_length=1024", "model.conditioning=none")
    both, one = (planned(recipe(*two, *more), 128, 8) for more in ((), ("thinking.learned_steps=1",)))
    compute = [e.step_seconds - e.data_traffic / 10e9 for e in (both, one)]
    assert compute[1] / compute[0] == pytest.approx(10 / 15, rel=0.01)


def test_levers_save_memory():
    base = planned(recipe("parallel.pipeline=2"), 1000, 8)
    assert (
        planned(recipe("parallel.pipeline=2", "parallel.micro_batches_in_flight=2"), 1000, 8).activation_bytes
        < base.activation_bytes
    )
    assert (
        planned(recipe("parallel.pipeline=2", "model.recompute_layers=true"), 1000, 8).activation_bytes
        < base.activation_bytes
    )
    assert (
        planned(recipe("parallel.pipeline=2", "thinking.logits_dtype=bfloat16"), 1000, 8).activation_bytes
        < base.activation_bytes
    )
    assert (
        planned(recipe("parallel.pipeline=2", "thinking.regenerate=256"), 1000, 8).activation_bytes
        < base.activation_bytes
    )
    assert (
        planned(recipe("parallel.pipeline=2", "parallel.distributed_optimizer=true"), 1000, 8).weight_bytes
        < base.weight_bytes
    )


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(RecipeError, match="number of ranks=3"):
        planned(recipe("parallel.pipeline=2"), 1000, 3)


def said_of(estimated, memory):
    return verdict(estimated.weight_bytes, estimated.activation_bytes, memory)[1]


def test_it_says_whether_the_recipe_fits_and_what_makes_it_smaller():
    estimated = planned(recipe(), 1000, 8)
    needed = (estimated.weight_bytes + estimated.activation_bytes) / 1e9
    assert said_of(estimated, 2 * needed).startswith(f"fits: {needed:.1f} GB of ")
    assert said_of(estimated, 1.05 * needed).startswith("may not fit")
    assert "does not fit" in (said := said_of(estimated, needed / 2)) and "micro_batch_size" in said
    states = planned(recipe("training.micro_batch_size=1", "data.sequence_length=16", "model.num_layers=60"), 100, 8)
    assert "distributed_optimizer" in said_of(states, 0.01)
