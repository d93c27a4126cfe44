"""`ebt-convert export RUN FOLDER`: the folder is all that it takes, wherever it is, and says what it is."""

import json
import os
import shutil
import stat
import struct

import pytest
import torch
import yaml
from typer.testing import CliRunner

import ebt_megatron as ebt
from ebt_megatron.checkpoint.llama import from_llama, to_llama
from ebt_megatron.checkpoint.weights import read_weights
from ebt_megatron.config import load_recipe
from ebt_megatron.parallel import setup
from ebt_megatron.sharing.export import Saved
from ebt_megatron.tools.convert import app
from tests import shared_models

PROMPT = "Document 3 says"


def size_of(png):
    """Width and height of a picture, as its header says."""
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return shared_models.text_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    yield shared_models.exported(runs, tmp_path_factory.mktemp("folders"))
    setup.shutdown()


@pytest.mark.parametrize("name", shared_models.MODELS)
def test_a_moved_folder_without_its_run_continues_as_the_run_does(name, runs, folders, tmp_path):
    moved = shutil.copytree(folders[name], tmp_path / "elsewhere")
    ours, theirs = ebt.load(runs[name]), ebt.load(moved)
    assert theirs.step == 3 and theirs.tokens == ours.tokens > 0
    moved_weights = dict(theirs.run.model.named_parameters())
    for key, p in ours.run.model.named_parameters():
        q, vocabulary = moved_weights.pop(key), "table" in key or "projection" in key
        valid = slice(ours.run.task.vocab_size) if vocabulary else ...  # padding stays behind
        assert torch.equal(p[valid], q[valid]), key
    assert not moved_weights
    for options in ({"temperature": 0}, {"seed": 2}):
        a, b = (m.generate(PROMPT, max_tokens=8, **options) for m in (ours, theirs))
        assert a.tokens == b.tokens and a.log_p == pytest.approx(b.log_p, abs=1e-6)


def test_what_is_in_a_folder_and_who_may_read_it(folders):
    for folder in folders.values():
        names = {p.name for p in folder.iterdir()}
        assert {
            "model.safetensors",
            "config.json",
            "recipe.yaml",
            "manifest.json",
            "tokenizer.json",
            "README.md",
            "losses.png",
        } <= names
        mask = os.umask(0)
        os.umask(mask)
        assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o666 & ~mask}
        recipe = load_recipe(folder / "recipe.yaml")
        assert recipe.data.train == [] and recipe.training.output_dir == "."
        everything = "".join(p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".yaml", ".md"))
        assert str(folder.parents[1]) not in everything.replace("tokenizer.json", ""), "no path of this machine"


def test_the_card_says_where_it_comes_from_and_what_it_lost(runs, folders, tmp_path):
    from ebt_megatron.sharing.export import export_folder

    card = (folders["ebt"] / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "ebt-megatron" and header["pipeline_tag"] == "text-generation"
    assert "An Energy-Based Transformer" in card and "| documents |" in card and "hidden_size: 32" in card
    assert "Not evaluated at this step" in card and "](losses.png)" in card
    trained_only = size_of(folders["ebt"] / "losses.png")
    rows = [{"steps": 1, "loss": 2.0, "energy": -1.0}, {"steps": 2, "loss": 1.5, "energy": -1.2}]
    evaluation = {"step": 3, "positions": 40, "trained_steps": 2, "thinking": rows}
    (runs["ebt"] / "evaluation.json").write_text(json.dumps(evaluation))
    export_folder(runs["ebt"], tmp_path / "again")
    assert "| 2 (trained with) | 1.5 | -1.2 |" in (tmp_path / "again" / "README.md").read_text()
    assert size_of(tmp_path / "again" / "losses.png")[0] > trained_only[0], "a panel against thinking"


def test_transformer_weights_go_to_llama_and_back(runs, folders):
    saved = Saved.read(runs["transformer"])
    vocab = json.loads((folders["transformer"] / "config.json").read_text())["vocab_size"]
    there = to_llama(saved.weights, saved.recipe, vocab)
    rows = saved.weights["embedding.table.weight"].shape[0]
    back = from_llama(there, saved.recipe, rows)
    assert back.keys() == saved.weights.keys() and rows > vocab
    for name, weight in saved.weights.items():
        assert torch.equal(back[name][:vocab], weight[:vocab]), name
    stored, _ = read_weights(folders["transformer"] / "model.safetensors")
    assert stored.keys() == there.keys()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "is of a model of another program"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json does not match the manifest"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "not a readable safetensors file"),
        (lambda f: (f / "recipe.yaml").unlink(), "is not a run directory"),
    ],
)
def test_a_damaged_folder_is_one_line(spoil, line, folders, tmp_path):
    folder = shutil.copytree(folders["ebt"], tmp_path / "f")
    spoil(folder)
    with pytest.raises((ebt.RecipeError, ebt.DataError), match=line) as error:
        ebt.load(folder)
    assert "\n" not in str(error.value)


def test_the_command_writes_a_folder_or_a_file_and_never_into_a_run(runs, tmp_path):
    def call(*arguments):
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    done = call(runs["ebt"], tmp_path / "out")
    assert done.exit_code == 0 and "model of 3 steps written to" in done.output, done.output
    done = call(runs["ebt"], tmp_path / "out.safetensors")
    assert done.exit_code == 0 and "weights written to" in done.output
    done = call(runs["ebt"], runs["transformer"])
    assert done.exit_code == 2 and "is a run's folder" in done.stderr
    done = call(tmp_path, tmp_path / "x")
    assert done.exit_code == 2 and "is neither a run" in done.stderr
