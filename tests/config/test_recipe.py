"""A recipe that cannot run is refused at once, with one line that names the key and the fix."""

import ast
import re
import typing
from pathlib import Path

import pytest

from ebt_megatron.checkpoint.checkpoints import fingerprint
from ebt_megatron.config import MODEL_SIZES, Recipe, RecipeError, all_keys, check, load_recipe, to_yaml
from ebt_megatron.config.thinking import ReplayConfig


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


CONTEXT = ["thinking.initial=context", "thinking.step_rule=mirror_descent"]


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
        (
            ["parallel.tensor=2", "parallel.sequence_parallel=true", "model.conditioning=time_embed_sequence"],
            "set parallel.sequence_parallel=false",
        ),
        (["thinking.min_steps=4"], "below thinking.min_steps=4"),
        (["thinking.engine=double_backward", "parallel.tensor=2"], "single-process"),
        (["thinking.regenerate=-1"], "a number of rows"),
        (["thinking.learned_steps=0"], "at least 1, or null for all"),
        ([*CONTEXT, "thinking.replay.enabled=true"], "set thinking.replay.enabled=false"),
        ([*CONTEXT, "model.conditioning=adaln_sequence"], "set model.conditioning=time_embed"),
        ([*CONTEXT, "thinking.initial_loss_weight=0"], "greater than 0"),
        (["thinking.step_rule=logits"], "choose one of probability_descent, logit_descent, mirror_descent"),
        (["training.cuda_graphs=true", "parallel.tensor=2"], "records no parallel.tensor > 1"),
        (["training.cuda_graphs=true", "thinking.replay.enabled=true"], "records no thinking.replay.enabled"),
        (["data.train=[a,b]", "data.train_weights=[1.0]"], "1 entries for 2"),
        (["training.steps=0"], "training.steps=0: must be greater than 0"),
        (["training.steps"], "not key=value"),
        (["name=${oc.env:EBT_NOT_SET}"], "name: Environment variable 'EBT_NOT_SET' not found"),
        (["name=${EBT_NOT_SET}"], "environment variables are ${oc.env:NAME}"),
        (["data.train=[$EBT_NOT_SET/a]"], "data.train=$EBT_NOT_SET/a: the environment variable EBT_NOT_SET is not set"),
        (["name=a: b: c"], "override 'name=a: b: c' is not a YAML value"),
        (["name={a"], "override 'name={a' is not a YAML value"),
        (["data.train=[a,b]", "data.train_weights=[.nan,1]"], "data.train_weights=nan: must be a finite number"),
        (["data.train=[a,b]", "data.train_weights=[-1,2]"], "must be at least 0, and not all 0"),
        (["data.train=[a,b]", "data.train_weights=[0,0]"], "must be at least 0, and not all 0"),
        (["training.seed=-1"], "training.seed=-1: must be at least 0"),
        (["training.keep_checkpoints=-1"], "training.keep_checkpoints=-1: must be a number of checkpoints, or 0"),
        (["training.max_bad_steps=0"], "training.max_bad_steps=0: must be at least 1"),
        (["training.save_interval=-5"], "training.save_interval=-5: must be at least 0"),
        (["training.steps=1.5"], "training.steps: Value '1.5'"),
        (["optimizer.lr=.nan"], "optimizer.lr=nan: must be a finite number"),
        (["optimizer.beta2=1"], "optimizer.beta2=1.0: must be at least 0 and below 1"),
    ],
)
def test_one_line_names_the_key_and_the_fix(overrides, said):
    with pytest.raises(RecipeError) as error:
        load_recipe(None, ["model.size=xxs", *overrides])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_and_paths_as_people_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("EBT_DATA", "/data")
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: {size: xxs}\ntraining: {steps: 1e3, output_dir: ~/runs/a}\n"
        "data: {train: '~/one', validation: [$EBT_DATA/two, 's3://~/${oc.env:EBT_DATA}']}"
    )
    recipe = load_recipe(file, ["training.global_batch_size=6.4e1", "name=run [1]"])
    assert (recipe.training.steps, recipe.training.global_batch_size, recipe.name) == (1000, 64, "run [1]")
    assert recipe.training.output_dir == "/home/ann/runs/a"
    assert recipe.data.train == ["/home/ann/one"]
    assert recipe.data.validation == ["/data/two", "s3://~//data"]


def test_a_recipe_changes_its_base(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {size: tiny}\nthinking: {max_steps: 5, step_size: 7}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nthinking: {step_size: 9}\n")
    (tmp_path / "c.yaml").write_text(f"base: {tmp_path}/b.yaml\nname: c\n")
    thinking = load_recipe(tmp_path / "c.yaml").thinking
    assert (thinking.max_steps, thinking.step_size) == (5, 9)
    assert load_recipe(tmp_path / "c.yaml", ["thinking.step_size=1"]).thinking.step_size == 1
    (tmp_path / "named.yaml").write_text("base: text/s2_xxs\n")
    assert load_recipe(tmp_path / "named.yaml").thinking.replay.enabled
    (tmp_path / "a.yaml").write_text("base: c.yaml\n")
    with pytest.raises(RecipeError, match="its base comes back to it"):
        load_recipe(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("base: text/s2_xsx\n")
    with pytest.raises(RecipeError, match=r"did you mean .*text/s2_xxs"):
        load_recipe(tmp_path / "d.yaml")


def test_a_missing_value_is_named_unless_a_later_layer_has_it(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text("name: ???\nmodel: {size: xs}\ndata: {train: [a, '???']}\n")
    for given, said in (
        ([], f"{file}: name=??? is a value that is still missing"),
        (["name=a"], f"{file}: data.train=??? is a value"),
        (["name=a", "data.train=[b]", "training.steps=???"], "command line: training.steps=??? is a value"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            load_recipe(file, given)
    recipe = load_recipe(file, ["name=a", "data.train=[b]", "training.steps=???", "training.steps=5"])
    assert (recipe.name, recipe.data.train, recipe.training.steps) == ("a", ["b"], 5)


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
    recipes = sorted(Path(__file__).parents[2].glob("recipes/*/*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        load_recipe(recipe)


ROOT = Path(__file__).parents[2]


def last(node) -> str:
    """The last name of a chain: `thinking` of `recipe.thinking`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def keys_read(source: str, sections: dict[str, str]) -> set[tuple[str, str]]:
    """(section, key) of every attribute that is read of a section's own name, of what it was assigned to, or of what is
    annotated as its class.

    Args:
        source: of a module.
        sections: the class of each.
    """
    tree = ast.parse(source)
    names = {section: {section} for section in sections}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs = zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
                for to, value in pairs:
                    if isinstance(value, ast.Attribute) and value.attr in sections:
                        names.setdefault(last(to), set()).add(value.attr)
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else last(node.target)
            names.setdefault(name, set()).update(s for s, cls in sections.items() if cls == last(node.annotation))
    chains = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {(section, chain.attr) for chain in chains for section in names.get(last(chain.value), ())}


def test_every_key_is_read_somewhere():
    """No flag that nothing reads: `recipe.thinking.reuse`, or `options.reuse` where options = recipe.thinking."""
    types = typing.get_type_hints(Recipe) | {"replay": ReplayConfig}
    sections = {key: types[key].__name__ for full in all_keys() for key in full.split(".")[:-1]}
    files = [p for p in ROOT.glob("ebt_megatron/**/*.py") if p.parent.name != "config"]
    read = set().union(*(keys_read(p.read_text(), sections) for p in files))
    unread = [key for key in all_keys() if "." in key and tuple(key.split(".")[-2:]) not in read]
    assert unread == ["model.size"]  # it says what other keys are
    other = "recipe.thinking.reuse; options = recipe.data; options.prefetch; run.speed"
    assert keys_read(other, sections) >= {("thinking", "reuse"), ("data", "prefetch")}
    assert not [key for key in keys_read("timer.reuse, run.prefetch", sections) if key[1] in ("reuse", "prefetch")]


def test_every_key_is_in_a_recipe_or_a_document():
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("recipes/**/*.yaml")]
    text = "".join(page.read_text() for page in pages)
    assert not [key for key in all_keys() if not re.search(rf"\b{key.split('.')[-1]}\b", text)]


def test_the_baseline_was_called_transformer(tmp_path, capsys):
    saved = tmp_path / "recipe.yaml"
    saved.write_text("model: {size: tiny, architecture: transformer}\n")
    assert load_recipe(saved).model.architecture == "baseline"
    said = capsys.readouterr()
    assert said.out.count("is baseline since 0.2") + said.err.count("is baseline since 0.2") == 1
    recipe = load_recipe(None, ["model.size=tiny", "model.architecture=transformer"])
    assert fingerprint(recipe, {})["model.architecture"] == "transformer"  # so that old checkpoints fit


def test_a_run_of_an_earlier_version_starts_at_zeros_still(tmp_path):
    saved = tmp_path / "recipe.yaml"
    saved.write_text("model: {size: tiny}\nthinking: {initial: zeros, initial_std: 1.0}\n")
    thinking = load_recipe(saved).thinking
    assert (thinking.initial, thinking.initial_std, thinking.starts_at_noise) == ("noise", 0, False)


def test_a_run_of_an_earlier_version_keeps_its_step_rule(tmp_path):
    saved = tmp_path / "recipe.yaml"
    for before, now in (("logits", "logit_descent"), ("probabilities", "probability_descent")):
        saved.write_text(f"model: {{size: tiny}}\nthinking: {{descend_on: {before}}}\n")
        assert load_recipe(saved).thinking.step_rule == now
