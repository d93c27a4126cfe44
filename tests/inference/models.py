"""Tiny models ready to think and to read text, without run directories."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models

from ebt_megatron.inference.engine import Engine
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.predictor import predictor_of
from ebt_megatron.inference.stages import Stages
from ebt_megatron.inference.texts import Texts
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.text import Text
from tests import builders

END = 0
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?:;-"[: builders.VOCAB - 1]


def run_of(recipe, dtype=torch.float64, model=None):
    """What `session.open_run` gives, of an untrained model."""
    model = builders.build(recipe, dtype) if model is None else model
    return SimpleNamespace(
        recipe=recipe,
        state=builders.state(recipe),
        task=Text(recipe, builders.VOCAB),
        model=model,
        objective=builders.objective(model, recipe),
    )


def run_on_layout(recipe):
    """The same on any layout, with weights that none changes, in fp32."""
    state = builders.state(recipe)
    return run_of(recipe, model=build_model(recipe, Text(recipe, builders.VOCAB)).to(state.device))


def engine_of(run) -> Engine:
    return Engine(run.model, run.recipe, Stages(run.state, run.model.config), run.task.length, 1.0)


def predictor(run, **options):
    return predictor_of(run, ThinkingOptions.of(options))


def texts_of(run, folder) -> Texts:
    """A tokenizer of letters."""
    letters = {"<|endoftext|>": END} | {letter: i for i, letter in enumerate(LETTERS, 1)}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.decoder = decoders.Fuse()
    return texts_with(tokenizer, run, folder)


def texts_with(tokenizer, run, folder, end=END) -> Texts:
    run.task.tokenizer_file = folder / "tokenizer.json"
    tokenizer.save(str(run.task.tokenizer_file))
    run.source = SimpleNamespace(manifest=SimpleNamespace(tokenizer={"end_of_text": end}))
    return Texts(run)


def everywhere(tokens):
    """Rows, positions and values of all tokens [B, S], row after row."""
    rows, positions = torch.meshgrid(*map(torch.arange, tokens.shape), indexing="ij")
    return rows.flatten(), positions.flatten(), tokens.flatten()
