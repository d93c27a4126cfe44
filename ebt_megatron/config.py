"""The recipe: typed configuration, model sizes, command-line overrides and their checks.

A recipe is one YAML file whose keys are the fields of `Recipe`. `load_recipe` merges, in
this order, the defaults below, the file, and `key=value` overrides, resolves the model
size, and checks that everything fits together before anything else starts.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ebt_megatron.catalog import find_recipe
from ebt_megatron.errors import RecipeError
from ebt_megatron.values import as_meant, check_ranges, expand_paths, with_today_names

__all__ = ["Recipe", "RecipeError", "all_keys", "check", "load_recipe", "resolve", "to_yaml"]


@dataclass
class ModelConfig:
    """What the network is."""

    architecture: str = "ebt"  # ebt | transformer (Transformer++)
    size: str | None = None  # a name of MODEL_SIZES; explicit fields below win over it
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None  # grouped-query attention; default: num_attention_heads
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None  # default: hidden_size (multiplier 1, as the paper)
    conditioning: str = "time_embed"  # how the step index enters; see CHOICES
    initialization: str = "unit_logits"  # the first step's logits have a deviation of about 1 at any vocabulary and
    # width | paper (embeddings N(0, 1), the prediction's Xavier; with step_size=500)
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    vocab_multiple: int = 128  # the vocabulary is padded to a multiple of this
    kernels: str = "auto"  # reference | torch | triton; auto: triton on CUDA, else torch
    recompute_layers: bool = False  # recompute context activations in the backward pass


@dataclass
class ReplayConfig:
    """The replay buffer: earlier samples restart from the prediction they ended with."""

    enabled: bool = False  # one replayed sample for every two fresh ones
    capacity: int = 4  # predictions kept per replay slot (one slot for two samples of the batch)


@dataclass
class ThinkingConfig:
    """How predictions are optimised, and which gradient trains the energy."""

    min_steps: int = 2
    max_steps: int = 2  # evaluation thinks this many steps; training draws from [min, max]
    step_rule: str = "probability_descent"  # y' = softmax(y) - alpha dE/dp, the public code's | logit_descent
    # (y - alpha dE/dy, the paper's listing) | mirror_descent (y - alpha dE/dp)
    loss: str = "every"  # every (mean over the steps' losses) | last
    learned_steps: int | None = None  # of the losses of every step, learn from so many, drawn anew each iteration
    gradient: str = "detached"  # detached | full | truncated; see docs/design.md
    step_size: float = 30.0
    learn_step_size: bool = True
    step_size_lr_multiplier: float | None = None  # default: 3 x step_size, as the paper's 1500 for 500
    step_size_min: float = 1e-4
    step_size_scale: float = 1.0  # alpha is drawn per position from [alpha/scale, alpha*scale]
    langevin_noise: float = 0.0  # standard deviation added to the prediction before each step
    langevin_in_evaluation: bool = True  # as the model was trained with it
    initial: str = "noise"  # noise | zeros
    initial_std: float = 0.3
    engine: str = "dual_stream"  # dual_stream | double_backward (the slow reference)
    reuse: bool = False  # learn takes activations and input gradients from propose (more memory)
    logits_dtype: str = "float32"  # float32 | bfloat16 (half the memory; small steps of a logit round away)
    regenerate: int = 0  # > 0: logits are not stored, every pass makes them anew, so many rows at a time (less memory)
    replay: ReplayConfig = field(default_factory=ReplayConfig)


@dataclass
class DataConfig:
    """Where samples come from."""

    modality: str = "text"  # text | video | images (shards of these are loaded; models are for text so far)
    train: list[str] = field(default_factory=list)  # shard folders (with manifest.json) or URLs
    train_weights: list[float] = field(default_factory=list)  # blend; default: by sample count
    validation: list[str] = field(default_factory=list)
    sequence_length: int = 256  # tokens predicted per sample
    document_mask: bool = False  # attention stays inside a document of a packed sequence
    shuffle: bool = True
    shuffle_shards: int = 0  # samples are mixed within random groups of so many shards; 0: with all others
    prefetch: int = 32  # micro-batches a background thread keeps ready, at least
    remote_readers: int = 4  # shards of a URL that are read at a time
    cache_dir: str | None = None  # where shards of URLs are kept; default: two groups of shuffle_shards in memory
    cache_gb: float | None = None  # shards used longest ago are removed from cache_dir to stay below; default: kept


@dataclass
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then cosine to min_lr_ratio * lr."""

    lr: float | None = None  # default: the model size's
    min_lr_ratio: float = 0.1
    warmup_steps: int = 10000
    decay_steps: int | None = None  # default: training.steps; a run made longer keeps its schedule with the old number
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class ParallelConfig:
    """How the model and the batch are split; data parallelism takes the ranks that are left."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    micro_batches_in_flight: int | None = None  # pipeline: bounds live contexts; default: all
    timeout_seconds: float = 600.0  # a collective that takes longer is reported as a hang


@dataclass
class TrainingConfig:
    """The loop."""

    steps: int = 1000
    global_batch_size: int = 64  # fresh samples per optimizer step, over all ranks
    micro_batch_size: int = 8  # samples per forward on one rank
    cuda_graphs: bool = False  # launch a micro-batch as one recorded graph: for small models on one GPU each
    precision: str = "fp32"  # fp32 | bf16 | fp8 (bf16, with the layers' matrix products in 8 bits)
    seed: int = 1234
    output_dir: str = "runs/run"
    resume: bool = True  # go on from the newest good checkpoint in output_dir; false: move what is there aside first
    log_interval: int = 10
    metrics: list[str] = field(default_factory=lambda: ["jsonl", "tensorboard"])  # and wandb; the report reads jsonl
    validation_interval: int = 200  # 0: never
    validation_samples: int = 256
    save_interval: int = 200  # 0: only at the end and on SIGTERM
    keep_checkpoints: int = 2  # the newest so many; 0: all
    async_save: bool = False
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops
    spike_factor: float = 0.0  # > 0: rewind when the loss exceeds this times its running mean
    spike_window: int = 100
    peak_tflops: float = 0.0  # per rank; > 0: metrics report model FLOPs utilisation against it
    profile_steps: int = 0  # > 0: write a torch profiler trace of that many steps


@dataclass
class Recipe:
    """One run."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


# layers, heads, width, learning rate: arXiv 2507.02092, except `tiny` (ours, for the quickstart).
MODEL_SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (2, 2, 96, 3e-3),
    "4xs": (2, 2, 128, 2.4e-3),
    "3xs": (4, 4, 256, 1.8e-3),
    "xxs": (6, 6, 384, 1.2e-3),
    "xs": (12, 6, 384, 9e-4),
    "small": (12, 12, 768, 6e-4),
    "medium": (24, 16, 1024, 3e-4),
    "large": (24, 16, 1536, 2.5e-4),
    "xl": (24, 32, 2048, 2e-4),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "model.architecture": ("ebt", "transformer"),
    "model.conditioning": ("none", "time_embed", "time_embed_sequence", "adaln", "adaln_zero", "adaln_sequence"),
    "model.initialization": ("unit_logits", "paper"),
    "model.kernels": ("auto", "reference", "torch", "triton"),
    "thinking.loss": ("every", "last"),
    "thinking.step_rule": ("probability_descent", "logit_descent", "mirror_descent"),
    "thinking.logits_dtype": ("float32", "bfloat16"),
    "thinking.gradient": ("detached", "full", "truncated"),
    "thinking.initial": ("noise", "zeros"),
    "thinking.engine": ("dual_stream", "double_backward"),
    "data.modality": ("text", "video", "images"),
    "training.precision": ("fp32", "bf16", "fp8"),
    "training.metrics": ("jsonl", "tensorboard", "wandb"),
}


def all_keys(cls: type = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key a recipe may contain, e.g. 'model.hidden_size'."""
    keys = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if dataclasses.is_dataclass(default):
            keys += all_keys(type(default), f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def _check_keys(given: Any, where: str) -> None:
    """Raise RecipeError on the first key of a nested mapping that no recipe has."""
    known = set(all_keys())

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            is_group = any(k.startswith(path + ".") for k in known)
            if isinstance(value, dict) and is_group:
                walk(value, path + ".")
            elif path not in known:
                near = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.5)
                hint = f"; did you mean '{near[0]}'?" if near else "; --help lists the keys"
                raise RecipeError(f"{where}: unknown key '{path}'{hint}")
            elif is_group:
                raise RecipeError(f"{where}: '{path}' is a group of keys, not a value")

    walk(given, "")


def _value_error(where: str, error: OmegaConfBaseException) -> RecipeError:
    hint = "; environment variables are ${oc.env:NAME}" if isinstance(error, InterpolationKeyError) else ""
    reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
    return RecipeError(f"{where}: {getattr(error, 'full_key', '')}: {reason}{hint}")


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, resolve sizes and check it.

    Args:
        path: a YAML file, or the name of one in recipes/ ("text/s1_xxs"), or None for the defaults alone.
        overrides: e.g. ["model.hidden_size=256", "parallel.tensor=2"].

    Raises:
        RecipeError: with one line naming what is wrong and the fix.
    """
    layers = []
    if path is not None:
        file = find_recipe(path)
        try:
            layers.append((str(path), OmegaConf.load(file)))
        except Exception as error:  # yaml raises its own family of errors
            raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    for item in overrides:
        if "=" not in item:
            raise RecipeError(f"override '{item}' is not key=value")
        try:
            layers.append(("command line", OmegaConf.from_dotlist([item])))
        except Exception as error:
            reason = getattr(error, "problem", None) or error
            raise RecipeError(f"override '{item}' is not a YAML value ({reason}): quote it") from None

    merged: Any = OmegaConf.structured(Recipe)
    for where, layer in layers:
        given = OmegaConf.to_container(layer)
        if not isinstance(given, dict):
            raise RecipeError(f"{where}: a recipe is a mapping of keys to values")
        given = with_today_names(given)
        _check_keys(given, where)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(as_meant(given, Recipe)))
        except OmegaConfBaseException as error:
            raise _value_error(where, error) from None
    try:
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _value_error(str(path or "recipe"), error) from None
    assert isinstance(recipe, Recipe)
    resolve(recipe)
    return recipe


def resolve(recipe: Recipe) -> None:
    """Fill in what the size and other fields imply, then check; raises RecipeError."""
    model, optimizer = recipe.model, recipe.optimizer
    if model.size is not None:
        if model.size not in MODEL_SIZES:
            raise RecipeError(f"model.size={model.size}: choose one of {', '.join(MODEL_SIZES)}")
        layers, heads, width, lr = MODEL_SIZES[model.size]
        model.num_layers = model.num_layers or layers
        model.num_attention_heads = model.num_attention_heads or heads
        model.hidden_size = model.hidden_size or width
        optimizer.lr = optimizer.lr or lr
    for key in ("num_layers", "num_attention_heads", "hidden_size"):
        if not getattr(model, key):
            raise RecipeError(f"model.{key} is not set: give it, or model.size")
    if not optimizer.lr:
        raise RecipeError("optimizer.lr is not set: give it, or model.size")
    model.num_query_groups = model.num_query_groups or model.num_attention_heads
    assert model.hidden_size
    model.ffn_hidden_size = model.ffn_hidden_size or model.hidden_size  # multiplier 1, as the paper
    optimizer.decay_steps = optimizer.decay_steps or recipe.training.steps
    if recipe.thinking.step_size_lr_multiplier is None:
        recipe.thinking.step_size_lr_multiplier = 3 * recipe.thinking.step_size
    expand_paths(recipe)
    check(recipe)


def check(recipe: Recipe, world_size: int | None = None) -> None:
    """Check values and that sizes divide; with world_size also the layout.

    Raises:
        RecipeError: one line naming the key and the fix.
    """
    for key, choices in CHOICES.items():
        value = OmegaConf.select(OmegaConf.structured(recipe), key)
        for chosen in value if OmegaConf.is_list(value) else [value]:
            if chosen not in choices:
                raise RecipeError(f"{key}={chosen}: choose one of {', '.join(choices)}")
    m, t, p, tr = recipe.model, recipe.thinking, recipe.parallel, recipe.training

    def positive(*keys: str) -> None:
        for key in keys:
            value = OmegaConf.select(OmegaConf.structured(recipe), key)
            if value is None or value <= 0:
                raise RecipeError(f"{key}={value}: must be greater than 0")

    def divides(what: str, total: int, by: str, divisor: int, fix: str) -> None:
        if total % divisor:
            raise RecipeError(f"{what}={total} is not divisible by {by}={divisor}: {fix}")

    positive(
        "model.num_layers", "model.hidden_size", "model.num_attention_heads",
        "model.num_query_groups", "model.ffn_hidden_size", "model.vocab_multiple",
        "thinking.min_steps", "thinking.step_size", "thinking.step_size_scale",
        "thinking.step_size_min", "data.sequence_length", "data.prefetch", "data.remote_readers",
        "optimizer.lr", "parallel.tensor", "parallel.pipeline", "training.steps", "training.global_batch_size",
        "training.micro_batch_size", "training.log_interval",
    )  # fmt: skip
    assert m.hidden_size and m.num_attention_heads and m.num_query_groups and m.ffn_hidden_size
    assert m.num_layers
    heads, tensor = m.num_attention_heads, p.tensor
    divides("model.hidden_size", m.hidden_size, "model.num_attention_heads", heads, "change either")
    divides("model.num_attention_heads", heads, "model.num_query_groups", m.num_query_groups,
            "every query group needs as many heads")  # fmt: skip
    divides("model.num_attention_heads", heads, "parallel.tensor", tensor, "each rank needs whole heads")
    divides("model.num_query_groups", m.num_query_groups, "parallel.tensor", tensor,
            "each rank needs whole query groups")  # fmt: skip
    divides("model.ffn_hidden_size", m.ffn_hidden_size, "model.num_attention_heads", heads,
            "gate and up weights are interleaved in one block per head")  # fmt: skip
    divides("model.vocab_multiple", m.vocab_multiple, "parallel.tensor", tensor,
            "raise model.vocab_multiple")  # fmt: skip
    divides("model.num_layers", m.num_layers, "parallel.pipeline", p.pipeline, "stages hold equal layers")
    if (m.hidden_size // heads) % 2:
        raise RecipeError(f"model.hidden_size/num_attention_heads={m.hidden_size // heads}: "
                          "rotary positions need an even head size")  # fmt: skip
    if p.sequence_parallel:
        divides("data.sequence_length", recipe.data.sequence_length, "parallel.tensor", tensor,
                "sequence parallelism splits the sequence")  # fmt: skip
        if tensor == 1:
            raise RecipeError("parallel.sequence_parallel=true needs parallel.tensor > 1")
        if m.conditioning == "time_embed_sequence":
            raise RecipeError("model.conditioning=time_embed_sequence puts a token before the sequence "
                              "and cannot be split: set parallel.sequence_parallel=false")  # fmt: skip
    if t.max_steps < t.min_steps:
        raise RecipeError(f"thinking.max_steps={t.max_steps} is below thinking.min_steps={t.min_steps}")
    if t.step_size_scale < 1:
        raise RecipeError(f"thinking.step_size_scale={t.step_size_scale}: must be at least 1")
    if t.learned_steps is not None and t.learned_steps < 1:
        raise RecipeError(f"thinking.learned_steps={t.learned_steps}: at least 1, or null for all")
    if t.engine == "double_backward" and tensor * p.pipeline > 1:
        raise RecipeError("thinking.engine=double_backward is a single-process reference: "
                          "set parallel.tensor=1 and parallel.pipeline=1")  # fmt: skip
    if tr.cuda_graphs:
        for what, given in (("parallel.tensor > 1", tensor > 1), ("parallel.pipeline > 1", p.pipeline > 1),
                            ("thinking.replay.enabled", t.replay.enabled)):  # fmt: skip
            if given:
                raise RecipeError(f"training.cuda_graphs=true records no {what}: set training.cuda_graphs=false")
    if tr.precision == "fp8":
        if t.engine == "double_backward":
            raise RecipeError("training.precision=fp8 cannot be differentiated twice: set thinking.engine=dual_stream")
        for what, total in (("model.hidden_size", m.hidden_size), ("model.ffn_hidden_size", m.ffn_hidden_size),
                            ("the keys' width", m.hidden_size // heads * m.num_query_groups)):  # fmt: skip
            divides(what, total, "16 x parallel.tensor", 16 * tensor, "training.precision=fp8 needs it")
    if t.regenerate < 0:
        raise RecipeError(f"thinking.regenerate={t.regenerate}: a number of rows, or 0 to store the logits")
    if t.reuse and p.pipeline > 1:
        raise RecipeError("thinking.reuse needs every layer on one pipeline stage: set parallel.pipeline=1")
    if t.reuse and m.recompute_layers:
        raise RecipeError("thinking.reuse keeps activations, model.recompute_layers drops them: set one to false")
    if m.conditioning == "time_embed_sequence" and recipe.data.document_mask:
        raise RecipeError("model.conditioning=time_embed_sequence has no document masks: set data.document_mask=false")
    check_ranges(recipe)
    if world_size is not None:
        divides("number of ranks", world_size, "parallel.tensor x parallel.pipeline",
                tensor * p.pipeline, "start a multiple of that many ranks")  # fmt: skip
        data_parallel = world_size // (tensor * p.pipeline)
        divides("training.global_batch_size", tr.global_batch_size,
                "training.micro_batch_size x data-parallel size",
                tr.micro_batch_size * data_parallel, "change either")  # fmt: skip


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML, loadable again."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))
