"""The recipe: one run, with what its parts imply for each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from ebt_megatron.config.data import DataConfig
from ebt_megatron.config.fields import check_values, expand_paths, require_divides
from ebt_megatron.config.images import ImagesConfig
from ebt_megatron.config.model import ModelConfig
from ebt_megatron.config.puzzles import PuzzlesConfig
from ebt_megatron.config.thinking import ThinkingConfig
from ebt_megatron.config.training import OptimizerConfig, ParallelConfig, TrainingConfig
from ebt_megatron.config.video import VideoConfig
from ebt_megatron.core.errors import RecipeError


@dataclass
class Recipe:
    """A recipe: everything that one run is."""

    name: str = "run"  # what the run is called, in metrics and reports
    model: ModelConfig = field(default_factory=ModelConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    puzzles: PuzzlesConfig = field(default_factory=PuzzlesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def resolve(recipe: Recipe) -> None:
    """Fill in what the size and other fields imply, then check; raises RecipeError."""
    check_values(recipe)
    of_size = recipe.model.resolve()
    recipe.optimizer.lr = recipe.optimizer.lr or of_size
    if not recipe.optimizer.lr:
        raise RecipeError("optimizer.lr is not set: give it, or model.size")
    recipe.optimizer.decay_steps = recipe.optimizer.decay_steps or recipe.training.steps
    if recipe.thinking.step_size_lr_multiplier is None:
        recipe.thinking.step_size_lr_multiplier = 3 * recipe.thinking.step_size
    expand_paths(recipe)
    check(recipe)


def check(recipe: Recipe, world_size: int | None = None) -> None:
    """Check every value, and that they fit each other; with world_size also the layout.

    Raises:
        RecipeError: one line naming the key and the fix.
    """
    check_values(recipe)
    recipe.model.check()
    recipe.thinking.check()
    recipe.data.check()
    recipe.images.check()
    recipe.training.check()
    recipe.parallel.check()
    _check_layout(recipe)
    _check_precision(recipe)
    if world_size is not None:
        ranks = recipe.parallel.tensor * recipe.parallel.pipeline
        require_divides(
            "number of ranks",
            world_size,
            "parallel.tensor x parallel.pipeline",
            ranks,
            "start a multiple of that many ranks",
        )
        training = recipe.training
        require_divides(
            "training.global_batch_size",
            training.global_batch_size,
            "training.micro_batch_size x data-parallel size",
            training.micro_batch_size * (world_size // ranks),
            "change either",
        )


def _check_layout(recipe: Recipe) -> None:
    """What splitting the model asks of its sizes, and what cannot be split."""
    m, t, p = recipe.model, recipe.thinking, recipe.parallel
    assert m.num_attention_heads and m.num_query_groups and m.num_layers
    for key, size, need in (
        ("model.num_attention_heads", m.num_attention_heads, "each rank needs whole heads"),
        ("model.num_query_groups", m.num_query_groups, "each rank needs whole query groups"),
        ("model.vocab_multiple", m.vocab_multiple, "raise model.vocab_multiple"),
    ):
        require_divides(key, size, "parallel.tensor", p.tensor, need)
    require_divides("model.num_layers", m.num_layers, "parallel.pipeline", p.pipeline, "stages hold equal layers")
    step_token = m.conditioning == "time_embed_sequence"
    if p.sequence_parallel:
        require_divides(
            "data.sequence_length",
            recipe.data.sequence_length,
            "parallel.tensor",
            p.tensor,
            "sequence parallelism splits the sequence",
        )
        if step_token:
            raise RecipeError(
                "model.conditioning=time_embed_sequence puts a token before the sequence "
                "and cannot be split: set parallel.sequence_parallel=false"
            )
    if step_token and recipe.data.document_mask:
        raise RecipeError("model.conditioning=time_embed_sequence has no document masks: set data.document_mask=false")
    if t.starts_at_context and m.conditioning in ("time_embed_sequence", "adaln_sequence"):
        raise RecipeError(
            f"model.conditioning={m.conditioning} computes the context anew for each step, and "
            "thinking.initial=context starts at the prediction of one: set model.conditioning=time_embed"
        )
    if t.engine == "double_backward" and p.tensor * p.pipeline > 1:
        raise RecipeError(
            "thinking.engine=double_backward is a single-process reference: "
            "set parallel.tensor=1 and parallel.pipeline=1"
        )
    if recipe.training.cuda_graphs:
        for what, given in (
            ("parallel.tensor > 1", p.tensor > 1),
            ("parallel.pipeline > 1", p.pipeline > 1),
            ("thinking.replay.enabled", t.replay.enabled),
        ):
            if given:
                raise RecipeError(f"training.cuda_graphs=true records no {what}: set training.cuda_graphs=false")


def _check_precision(recipe: Recipe) -> None:
    m, tensor = recipe.model, recipe.parallel.tensor
    if recipe.training.precision != "fp8":
        return
    if recipe.thinking.engine == "double_backward":
        raise RecipeError("training.precision=fp8 cannot be differentiated twice: set thinking.engine=dual_stream")
    assert m.hidden_size and m.ffn_hidden_size and m.num_attention_heads and m.num_query_groups
    for what, total in (
        ("model.hidden_size", m.hidden_size),
        ("model.ffn_hidden_size", m.ffn_hidden_size),
        ("the keys' width", m.hidden_size // m.num_attention_heads * m.num_query_groups),
    ):
        require_divides(what, total, "16 x parallel.tensor", 16 * tensor, "training.precision=fp8 needs it")
