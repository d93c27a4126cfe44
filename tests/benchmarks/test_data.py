"""Loaders that are compared deliver the same samples in the same form."""

import json
import urllib.request

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import data as data_benchmark
from ebt_megatron.data.folder import ShardFolder

LOADERS = {
    "gathered": data_benchmark.gathered,
    "converted": data_benchmark.converted,
    "ours": lambda folder, size: data_benchmark.ours(folder, size, thread=True),
    "ours, no thread": lambda folder, size: data_benchmark.ours(folder, size, thread=False),
    "ours, groups": lambda folder, size: data_benchmark.ours(folder, size, thread=True, together=1),
    "webdataset": lambda folder, size: data_benchmark.plain_webdataset([str(p) for p in folder.glob("*.tar")], size, 0),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_every_loader_delivers_the_samples_of_the_shards(loader, tmp_path):
    data_benchmark.make_shards(tmp_path, 1200, 15)
    known = {row.tobytes() for row in ShardFolder(str(tmp_path)).rows()}
    seen = set()
    for _, batch in zip(range(50), loader(tmp_path, 8), strict=False):
        assert batch.shape == (8, 16) and batch.dtype == torch.int64
        seen |= {row.astype(np.uint16).tobytes() for row in batch.numpy()}
    assert len(seen) == 400 and seen <= known


def test_a_folder_is_served(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with data_benchmark.served(tmp_path) as url, urllib.request.urlopen(f"{url}/file") as stream:
        assert stream.read() == b"content"


def test_the_command_writes_its_numbers(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(data_benchmark.main)
    options = ["--samples", "1200", "--sequence-length", "31", "--seconds", "0.05", "--megabytes", "2"]
    done = CliRunner().invoke(app, [*options, "--output", str(tmp_path / "n.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["samples"] == 1200 and all(value > 0 for value in found["samples_per_second"].values())
