"""A run begins with trained weights: a Transformer++'s become the context stream of an energy-based model."""

import pytest

from ebt_megatron.config import RecipeError
from ebt_megatron.parallel import setup
from ebt_megatron.session import open_run
from ebt_megatron.training.hooks import train_to_end
from ebt_megatron.training.run import Run
from tests import shared_models
from tests.distributed_utils import run_ranks
from tests.training.runs import recipe_of

transformers = pytest.importorskip("transformers")

BASELINE = "model.architecture=baseline", "model.vocab_multiple=48"
CONTEXT = (
    "model.architecture=ebt",
    "thinking.initial=context",
    "thinking.step_rule=mirror_descent",
    "model.vocab_multiple=48",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The run of a Transformer++, its exported folder, what transformers saves of it, and its validation loss."""
    folder = tmp_path_factory.mktemp("start")
    run = shared_models.text_runs(folder, ["transformer"])["transformer"]
    exported = shared_models.exported({"transformer": run}, folder / "exported")["transformer"]
    with open_run(run) as opened:
        batch = next(iter(opened.data["validation"]))
        loss = opened.objective.evaluate(opened.task.sample(batch, opened.state.device), 1).losses.mean()
    setup.shutdown()
    llama = folder / "llama"
    transformers.AutoModelForCausalLM.from_pretrained(exported).save_pretrained(llama)
    return {"data": folder / "shards", "run": run, "exported": exported, "llama": llama, "loss": float(loss)}


def first_loss(data, output, source, overrides=CONTEXT):
    """The loss of the context's own prediction before a step is taken, and after the first of a run's steps."""
    options = "training.validation_interval=1", "optimizer.lr=0.03", "optimizer.warmup_steps=0"
    run = Run(recipe_of(data, output, f"training.start_from={source}", *options, *overrides))
    run.begin()
    batch = next(iter(run.validation_data))

    def loss():
        found = run.trainer.objective.evaluate(run.session.task.sample(batch, run.state.device), 1)
        of = found.losses if found.initial is None else found.initial
        return float(of.mean())

    before = loss()
    run.take_step()
    after = loss()
    run.close()
    setup.shutdown()
    return before, after


@pytest.mark.parametrize("what", ["run", "exported", "llama"])
def test_the_context_s_prediction_is_the_transformer_s(what, models, tmp_path):
    first, next_ = first_loss(models["data"], tmp_path, models[what])
    assert first == pytest.approx(models["loss"], rel=1e-5) and next_ < first - 0.01


def test_a_transformer_goes_on_from_another(models, tmp_path):
    first, _ = first_loss(models["data"], tmp_path, models["run"], BASELINE)
    assert first == pytest.approx(models["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "layout", [("parallel.tensor=2", "parallel.sequence_parallel=true"), ("parallel.pipeline=2",)], ids=" ".join
)
def test_on_every_layout(layout, models, tmp_path):
    overrides = (*CONTEXT, *layout, "parallel.distributed_optimizer=true")
    found = max(run_ranks(first_loss, 2, models["data"], tmp_path, models["run"], overrides))  # 0 where there is none
    assert found == pytest.approx(first_loss(models["data"], tmp_path / "alone", models["run"]), rel=1e-5)


def test_a_run_that_has_begun_goes_on_with_its_own_weights(models, tmp_path):
    options = f"training.start_from={models['run']}", "training.async_save=false", *CONTEXT
    train_to_end(Run(recipe_of(models["data"], tmp_path, "training.steps=2", *options)))
    setup.shutdown()
    run = Run(recipe_of(models["data"], tmp_path, "training.steps=4", *options[1:], "training.start_from=/nowhere"))
    run.begin()
    assert run.step == 2
    run.close()
    setup.shutdown()


@pytest.mark.parametrize(
    ("what", "overrides", "line"),
    [
        (
            "run",
            ("model.architecture=ebt", "model.vocab_multiple=48"),
            "output.projection.weight has no place .* set thinking.initial=context",
        ),
        ("run", (*CONTEXT, "model.num_layers=1"), "trained with model.num_layers=2, this run has model.num_layers=1"),
        ("llama", (*CONTEXT, "model.num_layers=1"), "says num_hidden_layers=2, this run's model has 1"),
        ("llama", (*CONTEXT, "model.rotary_base=500"), "says rope_theta=10000.0, this run's model has 500.0"),
        ("data", CONTEXT, "neither a run, an exported model nor a model of transformers"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_begins(what, overrides, line, models, tmp_path):
    with pytest.raises(RecipeError, match=line):
        first_loss(models["data"], tmp_path / "run", models[what], overrides)
    setup.shutdown()
    assert not (tmp_path / "run" / "recipe.yaml").exists()
