"""docs/extending.md: a kind of sample that is neither text nor latents is checked, shown, blended and learned from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ebt_megatron.config import load_recipe
from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import Loader
from ebt_megatron.data.manifest import read_manifest
from ebt_megatron.data.shards import shard_infos, write_shard
from ebt_megatron.parallel.setup import shutdown
from ebt_megatron.tools.shards import app
from ebt_megatron.training.hooks import train_to_end
from ebt_megatron.training.run import Run
from examples.signals.signals import Signals, write_signals

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    for name, count, rate in (("train", 256, 8000), ("validation", 16, 8000), ("faster", 16, 16000)):
        write_signals(folder / name, count, 6, rate, len(name))
    return folder


def recipe(data, *overrides):
    return load_recipe(
        ROOT / "examples" / "points" / "points.yaml",
        [
            "data.modality=examples.signals.signals:Signals",
            "data.sequence_length=6",
            f"data.train=[{data}/train]",
            f"data.validation=[{data}/validation]",
            *overrides,
        ],
    )


def test_it_is_shown_and_counted(data):
    assert "256 samples in 1 shards: all good" in CliRunner().invoke(app, ["verify", f"{data}/train"]).output
    assert "values 12,288; unigram entropy" in CliRunner().invoke(app, ["stats", f"{data}/train"]).output
    assert len(CliRunner().invoke(app, ["sample", f"{data}/train"]).output.strip()) == 7 * 8
    assert "examples.signals.signals:SIGNAL" in CliRunner().invoke(app, ["inspect", f"{data}/train"]).output


def test_values_that_its_kind_rules_out_are_found(data, tmp_path):
    write_shard(tmp_path, 0, Signals.kind, np.full((2, 7, 8), 300, np.int16))
    wrong = replace(read_manifest(f"{data}/train"), dtype="int16", samples=2, shards=shard_infos(tmp_path, 1))
    wrong.write(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1 and "holds value 300, outside the 128 levels" in " ".join(result.output.split())


@pytest.mark.parametrize("where", ["tokenizer", "window"])
def test_a_file_that_made_its_samples_is_checked_and_kept_whatever_it_is(where, data, tmp_path):
    folder = shutil.copytree(data / "train", tmp_path / "made")
    (folder / "made.bin").write_bytes(b"any bytes")
    recorded = {"file": "made.bin", "sha256": sha256_of(folder / "made.bin")}
    given = read_manifest(str(folder))
    own = {"tokenizer": recorded} if where == "tokenizer" else {"facts": given.facts | {where: recorded}}
    replace(given, **own).write(folder)
    Description(str(folder)).copy_to(tmp_path / "kept")
    assert (tmp_path / "kept" / "made.bin").read_bytes() == b"any bytes"
    assert "all good" in CliRunner().invoke(app, ["verify", str(folder)]).output
    (folder / "made.bin").write_bytes(b"other bytes")
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1 and "not the one the shards were made with" in " ".join(result.output.split())


def test_folders_that_differ_in_a_fact_are_not_blended(data):
    with pytest.raises(DataError, match="faster has other facts than"):
        Loader(recipe(data, f"data.train=[{data}/train,{data}/faster]"), "train", 0, 1)


def test_a_model_learns_from_it(data, tmp_path):
    short = ("training.steps=20", "training.validation_interval=10", f"training.output_dir={tmp_path}")
    train_to_end(Run(recipe(data, *short)))
    shutdown()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = (row["validation_loss"] for row in rows if "validation_loss" in row)
    assert last < first
