"""Reads and checks recipes: a dataclass for each part with its own choices and checks, files and overrides."""

from ebt_megatron.config.data import DataConfig
from ebt_megatron.config.images import ImagesConfig
from ebt_megatron.config.loading import all_keys, load_recipe, to_yaml
from ebt_megatron.config.model import MODEL_SIZES, ModelConfig
from ebt_megatron.config.recipe import Recipe, check, resolve
from ebt_megatron.config.thinking import ReplayConfig, ThinkingConfig
from ebt_megatron.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from ebt_megatron.config.video import VideoConfig
from ebt_megatron.core.errors import RecipeError

__all__ = [
    "MODEL_SIZES",
    "DataConfig",
    "ImagesConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RecipeError",
    "ReplayConfig",
    "ThinkingConfig",
    "TrainingConfig",
    "VideoConfig",
    "all_keys",
    "check",
    "load_recipe",
    "resolve",
    "to_yaml",
]
