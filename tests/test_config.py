"""A recipe that cannot run is refused at once, with one line that names the key and the fix."""

import pytest

from ebt_megatron.config import MODEL_SIZES, RecipeError, all_keys, check, load_recipe, to_yaml


def test_sizes_fill_in_layers_heads_width_and_learning_rate():
    for name, (layers, heads, width, lr) in MODEL_SIZES.items():
        recipe = load_recipe(None, [f"model.size={name}"])
        m = recipe.model
        assert (m.num_layers, m.num_attention_heads, m.hidden_size, recipe.optimizer.lr) == (layers, heads, width, lr)
        assert m.ffn_hidden_size == width


def test_explicit_fields_win_over_the_size():
    assert load_recipe(None, ["model.size=xxs", "model.num_layers=2"]).model.num_layers == 2


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {size: xxs}\ntraining: {steps: 5}\n")
    assert load_recipe(file).training.steps == 5
    assert load_recipe(file, ["training.steps=7"]).training.steps == 7


def test_the_resolved_recipe_loads_again(tmp_path):
    recipe = load_recipe(None, ["model.size=xs", "thinking.replay.enabled=true"])
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.hiden_size=256"], "did you mean 'model.hidden_size'"),
        (["thinking.replay.capcity=3"], "did you mean 'thinking.replay.capacity'"),
        (["model.num_layers=many"], "model.num_layers"),
        (["model.size=huge"], "choose one of"),
        (["model.conditioning=adalm"], "model.conditioning=adalm: choose one of"),
        (["training.metrics=[jsonl,tensorbord]"], "training.metrics=tensorbord: choose one of jsonl, tensorboard"),
        (["parallel.tensor=5"], "model.num_attention_heads=6 is not divisible by parallel.tensor=5"),
        (["parallel.pipeline=4"], "model.num_layers=6 is not divisible by parallel.pipeline=4"),
        (["model.num_query_groups=4"], "not divisible by model.num_query_groups=4"),
        (["model.vocab_multiple=3", "parallel.tensor=2"], "model.vocab_multiple"),
        (["parallel.sequence_parallel=true"], "needs parallel.tensor > 1"),
        (["parallel.tensor=2", "parallel.sequence_parallel=true", "model.conditioning=time_embed_sequence"],
         "set parallel.sequence_parallel=false"),
        (["thinking.min_steps=4"], "below thinking.min_steps=4"),
        (["thinking.engine=double_backward", "parallel.tensor=2"], "single-process"),
        (["thinking.regenerate=-1"], "a number of rows"),
        (["thinking.learned_steps=0"], "at least 1, or null for all"),
        (["thinking.step_rule=logits"], "choose one of probability_descent, logit_descent, mirror_descent"),
        (["training.cuda_graphs=true", "parallel.tensor=2"], "records no parallel.tensor > 1"),
        (["training.cuda_graphs=true", "thinking.replay.enabled=true"], "records no thinking.replay.enabled"),
        (["data.train=[a,b]", "data.train_weights=[1.0]"], "1 entries for 2"),
        (["training.steps=0"], "training.steps=0: must be greater than 0"),
        (["training.steps"], "not key=value"),
    ],
)  # fmt: skip
def test_one_line_names_the_key_and_the_fix(overrides, said):
    with pytest.raises(RecipeError) as error:
        load_recipe(None, ["model.size=xxs", *overrides])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_size_or_its_parts_must_be_given():
    with pytest.raises(RecipeError, match=r"model\.num_layers is not set"):
        load_recipe(None)


def test_the_layout_must_fit_the_number_of_ranks():
    recipe = load_recipe(None, ["model.size=xxs", "parallel.tensor=2", "training.global_batch_size=24"])
    check(recipe, world_size=6)
    with pytest.raises(RecipeError, match=r"number of ranks=3 is not divisible by .*=2"):
        check(recipe, world_size=3)
    with pytest.raises(RecipeError, match=r"training.global_batch_size=24 is not divisible by .*=32"):
        check(recipe, world_size=8)


def test_every_shipped_recipe_loads():
    from pathlib import Path

    recipes = sorted(Path(__file__).parents[1].glob("recipes/*/*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        load_recipe(recipe)


def test_every_key_is_read_somewhere():
    """No flag that nothing reads."""
    from pathlib import Path

    sources = Path(__file__).parents[1].glob("ebt_megatron/**/*.py")
    text = "".join(p.read_text() for p in sources if p.name != "config.py")
    unread = [key for key in all_keys() if f".{key.split('.')[-1]}" not in text and key not in ("model.size",)]
    assert not unread
