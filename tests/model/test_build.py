"""Models are built from recipes alone, with the same initial weights on every layout."""

import pytest
import torch

from ebt_megatron.config import RecipeError
from ebt_megatron.model.build import SampleShape, build_model, padded
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.parallel.setup import initialize
from tests.builders import VOCAB, small_recipe
from tests.distributed_utils import run_ranks


def model_of(*overrides):
    recipe = small_recipe(*overrides)
    initialize(recipe.parallel, recipe.training.seed)
    return build_model(recipe, SampleShape(vocab_size=VOCAB))


def test_the_architecture_chooses_the_class():
    assert isinstance(model_of(), EnergyTransformer)
    assert isinstance(model_of("model.architecture=transformer"), TransformerLM)


def test_ebt_and_transformer_have_the_same_layers():
    def layers(model):
        return {n: p.shape for n, p in model.named_parameters() if n.startswith("layers.")}

    assert layers(model_of()) == layers(model_of("model.architecture=transformer")) != {}


def test_a_modality_without_a_model_is_refused():
    with pytest.raises(RecipeError, match="no model for it yet"):
        model_of("data.modality=video")


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
