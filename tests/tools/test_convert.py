"""Weights leave a run of any layout and start another, bit for bit."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebt_megatron.checkpoint.weights import read_weights, write_weights
from ebt_megatron.config import RecipeError, load_recipe, to_yaml
from ebt_megatron.tools.convert import export_weights, import_weights
from ebt_megatron.training.lock import RunLock
from tests.builders import small_recipe, text_shards
from tests.distributed_utils import run_ranks

DOCUMENTS = [f"Document {i} says " + " ".join(f"word{j * i % 97}" for j in range(40)) for i in range(60)]
SPLIT = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe's file, with shards beside it."""
    folder = tmp_path_factory.mktemp("data")
    shards = text_shards(folder, DOCUMENTS, 16, 500)
    path = folder / "recipe.yaml"
    path.write_text(
        to_yaml(
            small_recipe(
                f"data.train=[{shards}/train]",
                f"data.validation=[{shards}/validation]",
                "data.sequence_length=16",
                "training.steps=2",
                "training.validation_samples=4",
                "training.global_batch_size=4",
            )
        )
    )
    return path


def started(recipe, output, *overrides):
    """A run's folder with one checkpoint of random weights, as the recipe's layout saves it."""
    from ebt_megatron.training.run import Run

    run = Run(load_recipe(recipe, [f"training.output_dir={output}", *overrides]))
    run.write_checkpoint(None)
    if run.is_main:
        (output / "recipe.yaml").write_text(to_yaml(run.recipe))
    return run


@pytest.fixture(scope="module")
def weights(recipe, tmp_path_factory):
    """A file of weights unlike those a run starts with."""
    folder = tmp_path_factory.mktemp("weights")
    started(recipe, folder / "run")
    export_weights(folder / "run", folder / "initial.safetensors")
    tensors, metadata = read_weights(folder / "initial.safetensors")
    changed = {name: w + 0.1 * torch.randn_like(w) for name, w in tensors.items()}
    save_file(changed, folder / "weights.safetensors", metadata)
    return folder / "weights.safetensors"


def assert_same(ours: Path, theirs: Path):
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def test_names_are_global_and_weights_whole(weights):
    tensors, metadata = read_weights(weights)
    assert {"layers.0.qkv.weight", "layers.1.qkv.weight", "head", "step_size"} <= tensors.keys()
    assert tensors["layers.1.fc1.weight"].shape == (64, 32)
    assert "conditioning: time_embed" in metadata["recipe"] and metadata["step"] == "0"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_round_trip(recipe, weights, tmp_path, precision):
    import_weights(weights, recipe, tmp_path / "run", [f"training.precision={precision}"])
    export_weights(tmp_path / "run" / "checkpoints" / "step-00000000", tmp_path / "again.safetensors")
    assert_same(tmp_path / "again.safetensors", weights)


def _saved_again(recipe, source, output, overrides):
    """Load another run's checkpoint in this layout, and save it from there."""
    run = started(recipe, output / "unused", *overrides)
    run.restore(next((source / "checkpoints").glob("step-*")))
    run.checkpoints.folder = output / "checkpoints"
    run.write_checkpoint(None)
    if run.is_main:
        (output / "recipe.yaml").write_text(to_yaml(run.recipe))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("parallel.distributed_optimizer=true", "training.precision=bf16"),
    ],
    ids=str,
)
def test_every_layout_exports_the_same(recipe, weights, tmp_path, overrides):
    import_weights(weights, recipe, tmp_path / "run", [o for o in overrides if "precision" in o])
    run_ranks(_saved_again, 4, recipe, tmp_path / "run", tmp_path / "split", (*SPLIT, *overrides))
    export_weights(tmp_path / "split", tmp_path / "split.safetensors")
    assert_same(tmp_path / "split.safetensors", weights)


def test_runs_start_from_it(recipe, weights, tmp_path, capfd):
    from ebt_megatron.evaluation.evaluate import evaluate
    from ebt_megatron.session import open_run
    from ebt_megatron.training.hooks import train_to_end
    from ebt_megatron.training.run import Run

    import_weights(weights, recipe, tmp_path / "run", ["thinking.step_size=7"])
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.thinking.step_size == 7 and saved.training.output_dir == str(tmp_path / "run")
    with open_run(tmp_path / "run") as opened:
        assert evaluate(opened, steps=1, example=False)["step"] == 0
    run = Run(saved)
    train_to_end(run)
    assert run.step == 2 and "resumed from" in capfd.readouterr().err
    assert export_weights(tmp_path / "run", tmp_path / "after.safetensors")[0].name == "step-00000002"
    before, after = load_file(weights), load_file(tmp_path / "after.safetensors")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before if name != "step_size"}
    assert all(0 < m < 0.01 for m in moved.values()), moved


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path, limit = tmp_path / "w.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_weights(path, {"a": torch.ones(3)}, "", {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # bytes a file may have
    try:
        with pytest.raises(RecipeError, match=r"w\.safetensors cannot be written"):
            write_weights(path, {"a": torch.zeros(1 << 16)}, "", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert read_weights(path)[0]["a"].tolist() == [1, 1, 1] and list(tmp_path.iterdir()) == [path]


def test_what_does_not_fit_is_named(recipe, weights, tmp_path):
    tensors, metadata = read_weights(weights)

    def refused(tensors, metadata, *overrides):
        save_file(tensors, tmp_path / "w.safetensors", metadata)
        with pytest.raises(RecipeError) as error:
            import_weights(tmp_path / "w.safetensors", recipe, tmp_path / "run", list(overrides))
        assert "\n" not in str(error.value) and not list((tmp_path / "run").glob("checkpoints/step*"))
        return str(error.value)

    assert "head is missing" in refused({k: v for k, v in tensors.items() if k != "head"}, metadata)
    assert "extra is not in the recipe's model" in refused(tensors | {"extra": torch.zeros(1)}, metadata)
    assert "head is [3], the recipe's model has [32]" in refused(tensors | {"head": torch.zeros(3)}, metadata)
    assert "model.rotary_base=10000.0, this run has model.rotary_base=500" in refused(
        tensors, metadata, "model.rotary_base=500"
    )
    assert "vocab_size=7, this run has vocab_size=400" in refused(tensors, {"fingerprint": '{"vocab_size": 7}'})
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(RecipeError, match="not a readable safetensors file"):
        import_weights(tmp_path / "text", recipe, tmp_path / "run", [])
    with pytest.raises(RecipeError, match="neither a run"):
        export_weights(tmp_path, tmp_path / "out.safetensors")
    run = RunLock(tmp_path / "run")
    run.acquire()
    with pytest.raises(RecipeError, match="is in use by process"):
        import_weights(weights, recipe, tmp_path / "run", [])
    run.release()
    assert not list((tmp_path / "run").iterdir())
    started(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match="holds checkpoints already"):
        import_weights(weights, recipe, tmp_path / "run", [])
    damaged = tmp_path / "run" / "checkpoints" / "step-00000000"
    (damaged / "common.pt").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"damaged checkpoint: .*common\.pt"):
        export_weights(damaged, tmp_path / "out.safetensors")
