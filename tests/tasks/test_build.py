"""Models are built from recipes alone, with the same initial weights on every layout."""

import pytest
import torch

from ebt_megatron.config import RecipeError
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.tasks import task_class
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.text import Text, padded
from tests.builders import VOCAB, small_recipe
from tests.distributed_utils import run_ranks
from tests.tasks import latents


def model_of(*overrides):
    recipe = small_recipe(*overrides)
    initialize(recipe.parallel, recipe.training.seed)
    return build_model(recipe, Text(recipe, VOCAB))


def test_the_architecture_chooses_the_class():
    assert isinstance(model_of(), EnergyTransformer)
    assert isinstance(model_of("model.architecture=baseline"), TransformerLM)


def test_ebt_and_transformer_have_the_same_layers():
    def layers(model):
        return {n: p.shape for n, p in model.named_parameters() if n.startswith("layers.")}

    assert layers(model_of()) == layers(model_of("model.architecture=baseline")) != {}


@pytest.mark.parametrize("modality", ["txt", "ebt_megatron.tasks.text:Txet", "no.such.module:Task"])
def test_a_modality_there_is_not_is_refused(modality):
    with pytest.raises(RecipeError, match=f"data.modality={modality}: choose one of text, .*or package.module:Class"):
        task_class(modality)


def test_a_class_of_ones_own_is_found():
    assert task_class("ebt_megatron.tasks.text:Text") is task_class("text") is Text


def test_thinking_starts_at_the_context_s_prediction_only_where_there_is_one():
    with pytest.raises(RecipeError, match=r"set thinking\.step_rule=mirror_descent"):
        Text.from_data(small_recipe("thinking.initial=context"), None)
    recipe = latents.pictures_recipe("thinking.initial=context")
    initialize(recipe.parallel, recipe.training.seed)
    with pytest.raises(RecipeError, match=r"an energy for each position, which data\.modality=images has not"):
        build_model(recipe, latents.task(recipe))


def test_the_vocabulary_is_padded_to_a_multiple():
    assert padded(61, 16) == 64 == padded(64, 16)


def _norms():
    model = model_of("parallel.tensor=2")
    squares = torch.stack([p.detach().double().square().sum() for n, p in model.named_parameters() if "qkv" in n])
    torch.distributed.all_reduce(squares)
    return squares.tolist()


def test_weights_do_not_depend_on_the_layout():
    whole = [p.detach().double().square().sum().item() for n, p in model_of().named_parameters() if "qkv" in n]
    assert run_ranks(_norms, 2)[0] == pytest.approx(whole, rel=1e-6)
