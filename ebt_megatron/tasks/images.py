"""Pictures: denoised, or made from noise; an EBT whose energy is that of the whole picture, beside a DiT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import ImagesConfig, Recipe, RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.core.randomness import CLASS_STREAM, LEVEL_STREAM, PICTURE_NOISE_STREAM, START_STREAM, uniform
from ebt_megatron.data.captions import LONGEST, NOT_TOLD
from ebt_megatron.data.decoder import Decoder, psnr
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.kernels import Kernels
from ebt_megatron.kernels.noise import add_noise_, row_keys
from ebt_megatron.model.captions import CaptionShape
from ebt_megatron.model.condition import ConditionEmbedding, positions_2d
from ebt_megatron.model.flops import Cost, joint_cost
from ebt_megatron.model.joint import DiffusionTransformer, JointEnergy
from ebt_megatron.tasks.diffusion import NoiseSchedule
from ebt_megatron.tasks.interface import NoMeter, Sample
from ebt_megatron.tasks.latent_model import LatentEmbedding, LatentEmbeddings
from ebt_megatron.tasks.latents import check_latents, decoder_of, encoder_of
from ebt_megatron.thinking.dual_stream import Thinker


class PictureEmbeddings(LatentEmbeddings):
    """The EBT's view of pictures, `Embeddings`: what is observed is their condition, (level, class, caption).

    Args:
        config: Megatron's.
        channels: of a patch.
        kernels: how the hot operations run.
        places: [S, D], where in the picture each patch is.
        condition: (level, class, caption) -> [B, D].
    """

    def __init__(
        self, config: TransformerConfig, channels: int, kernels: Kernels, places: Tensor, condition: ConditionEmbedding
    ):
        super().__init__(config, channels, kernels, places)
        self.condition = condition

    def context(self, observed: Tensor) -> Tensor:
        """Conditions [B, 2 + a caption's size] -> [1, B, D]."""
        return self.condition(observed)[None]


class Images:
    """Pictures, a `Task`.

    Where a prediction starts says what is learned: at the noised picture (`thinking.initial=observed`), to denoise;
    at noise or zeros, to make pictures, by their class if `images.classes`, their caption if `images.captions`.

    Args:
        recipe: the run.
        shape: [patches, channels] of a picture.
        encoder: the SHA-256 of what made the latents.
        decoder: what shows them, or None.
        classes: of the labels; 0: there are no labels.
        grid: rows and columns of patches; default: a square.
        captions: what the manifest says of captions; empty: there are none.

    Raises:
        RecipeError, DataError: for settings or data that do not do.
    """

    kind = "images"
    evaluation = "ebt_megatron.evaluation.picture_evaluation:PictureEvaluation"

    def __init__(
        self,
        recipe: Recipe,
        shape: list[int],
        encoder: str = "",
        decoder: Decoder | None = None,
        classes: int = 0,
        grid: tuple[int, int] | None = None,
        captions: dict[str, Any] | None = None,
    ):
        check_latents(recipe)
        self.recipe, self.options, self.decoder = recipe, recipe.images, decoder
        self.length, self.channels = shape
        side = round(self.length**0.5)
        self.grid = grid or (side, side)
        self._check(classes, captions or {})
        self.classes = classes if self.options.classes else 0
        self.schedule = NoiseSchedule(self.options)
        self.captions: CaptionShape | None = None
        if self.options.captions and captions:
            self.captions = CaptionShape(captions["shape"][0], captions.get("entries", 0))
        self.denoises = recipe.model.architecture != "ebt" or recipe.thinking.initial == "observed"
        self.told_level = self.denoises and (recipe.model.architecture != "ebt" or self.options.see_level)
        self.identity = {
            "encoder": encoder,
            "picture": list(shape),
            "classes": self.classes,
            "told the level": self.told_level,
            "images.learn_sigma": self.options.learn_sigma,
        }
        for key in ("sigma_output", "condition_vector"):  # what checkpoints without them have is the default
            given = getattr(self.options, key)
            if given != getattr(ImagesConfig, key):
                self.identity[f"images.{key}"] = given
        if not (self.options.condition_vector or self.told_level or self.classes or self.captions):
            raise RecipeError(
                "images.condition_vector=false leaves the layers without a condition: set it to true, or let the model "
                "see levels, classes or captions"
            )
        if self.captions and captions:
            self.identity["captions"] = [captions["sha256"], *captions["shape"]]

    def _check(self, classes: int, captions: dict[str, Any]) -> None:
        model, data = self.recipe.model, self.recipe.data
        if self.grid[0] * self.grid[1] != self.length:
            raise DataError(
                f"pictures of {self.length} patches are no {self.grid[0]} x {self.grid[1]}: prepare the data again"
            )
        if data.sequence_length != self.length:
            raise RecipeError(
                f"data.sequence_length={data.sequence_length}, and pictures have {self.length} patches: "
                f"set data.sequence_length={self.length}"
            )
        if self.options.classes and not classes:
            raise DataError(
                "images.classes=true needs labels, and the shards have none: prepare them with labels, or "
                "set images.classes=false"
            )
        if self.options.captions and not captions:
            raise DataError(
                "images.captions=true needs captions, and the shards have none: prepare them with "
                "--captions, or set images.captions=false"
            )
        for wrong, why in (
            (
                model.conditioning not in ("none", "adaln_zero"),
                f"model.conditioning={model.conditioning}: pictures have none (one landscape) or "
                "adaln_zero (one for each "
                "step)",
            ),
            (
                model.num_query_groups != model.num_attention_heads,
                f"model.num_query_groups={model.num_query_groups}: pictures have one group for each head",
            ),
            (
                model.energy_head != "linear",
                f"model.energy_head={model.energy_head}: the energy of a picture has linear alone",
            ),
            (
                self.options.learn_sigma and model.architecture == "ebt",
                "images.learn_sigma is about a DiT's random steps: set it to false, or model.architecture=baseline",
            ),
            (
                self._starts_near and self.recipe.thinking.initial != "observed",
                "thinking.starts_near_answer goes on the way from the noised picture: set thinking.initial=observed",
            ),
            (self.recipe.training.precision == "fp8", "training.precision=fp8 has no layers for pictures: set bf16"),
        ):
            if wrong:
                raise RecipeError(why)

    @property
    def _starts_near(self) -> bool:
        return self.recipe.model.architecture == "ebt" and self.recipe.thinking.starts_near_answer > 0

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Images:
        """See `Task`."""
        manifest = source.manifest
        encoder = encoder_of(source)
        grid = encoder["height"] // encoder["patch"], encoder["width"] // encoder["patch"]
        classes = len(manifest.classes)
        return cls(recipe, manifest.shape, encoder["sha256"], decoder_of(source), classes, grid, manifest.captions)

    @classmethod
    def of_size(cls, recipe: Recipe, vocab_size: int, channels: int) -> Images:
        """See `Task`; `channels` are the numbers of a patch, and classes and captions as many and as long as any."""
        options, length = recipe.images, recipe.data.sequence_length
        captions = {"shape": [LONGEST], "entries": vocab_size, "sha256": ""} if options.captions else None
        classes = 1000 if options.classes else 0
        return cls(recipe, [length, channels], classes=classes, grid=(1, length), captions=captions)

    # --- what a model sees ----------------------------------------------------------------------

    def made_up(self, sample_ids: Tensor) -> MicroBatch:
        """See `Task`: every picture is of the first class, or has a caption that is not told."""
        count, beside = len(sample_ids), {}
        if self.classes:
            beside["labels"] = torch.zeros(count, dtype=torch.int64)
        if self.captions is not None:
            caption = torch.full((count, self.captions.size), NOT_TOLD)
            beside["captions"] = caption if self.captions.entries else torch.zeros_like(caption, dtype=torch.float32)
        return MicroBatch(sample_ids, torch.zeros(count, self.length, self.channels), beside=beside)

    def sample(self, batch: MicroBatch, device: torch.device, level: int | None = None) -> Sample:
        """Pictures with noise at a level drawn for each, or at `level`.

        What is observed is (level, class, caption), conditional or not; the start is the noised picture, and the
        target the picture, or its noise for a DiT.
        """
        assert batch.samples is not None
        clean, ids = batch.samples.to(device), batch.sample_ids.to(device)
        levels = self._levels(ids) if level is None else torch.full_like(ids, level)
        noise = self.noise(ids)
        observed = self._conditions(batch, ids, levels)
        start = self.schedule.noised(clean, noise, levels) if self.denoises else None
        if self._starts_near and start is not None and batch.counts is None:
            start = start + self._way(ids)[:, None, None] * (clean - start)
        start = None if start is None else start.transpose(0, 1)
        targets = clean if self.recipe.model.architecture == "ebt" else noise
        return Sample(observed, targets, ids, start=start)

    def _way(self, sample_ids: Tensor) -> Tensor:
        """How far [B] each picture's start is on the way to the clean one: for some a drawn part, else 0."""
        far, chosen = uniform(
            self.recipe.training.seed, sample_ids, torch.arange(2, device=sample_ids.device), START_STREAM
        )
        return torch.where(chosen < self.recipe.thinking.starts_near_answer, far, 0.0)

    def noise(self, sample_ids: Tensor, stream: int = 0) -> Tensor:
        """N(0, 1) [B, S, C], a function of sample and stream."""
        positions = torch.arange(self.length, device=sample_ids.device)
        keys = row_keys(sample_ids, positions, PICTURE_NOISE_STREAM + stream)
        noise = torch.zeros(len(keys), self.channels, device=sample_ids.device)
        add_noise_(noise, keys, 0, 1.0, self.recipe.training.seed)
        return noise.unflatten(0, (self.length, -1)).transpose(0, 1)

    def _draw(self, sample_ids: Tensor, stream: int) -> Tensor:
        only = torch.zeros(1, dtype=torch.int64, device=sample_ids.device)
        return uniform(self.recipe.training.seed, sample_ids, only, stream)[0]

    def _levels(self, sample_ids: Tensor) -> Tensor:
        low, high = self.options.lowest_level, self.options.highest_level
        if self.recipe.model.architecture != "ebt" and self.options.dit_levels == "all":
            low, high = 0, self.options.schedule_steps - 1
        return low + (self._draw(sample_ids, LEVEL_STREAM) * (high - low + 1)).long()

    def _conditions(self, batch: MicroBatch, sample_ids: Tensor, levels: Tensor) -> Tensor:
        """The condition of each picture; some in training are without class and caption."""
        device = sample_ids.device
        conditional = self.conditions(levels, batch.beside.get("labels"), batch.beside.get("captions")).to(device)
        if batch.counts is not None or (not self.classes and self.captions is None):
            return conditional
        dropped = self._draw(sample_ids, CLASS_STREAM) < self.options.class_dropout
        return torch.where(dropped[:, None], self.unconditional(conditional), conditional)

    def conditions(self, levels: Tensor, labels: Tensor | None = None, captions: Tensor | None = None) -> Tensor:
        """Conditions [B, 2 + a caption's size] of levels, labels [B] and captions, those that the model takes.

        Without labels, or captions, they are unconditional.
        """
        zero = torch.zeros_like(levels)
        level, label = levels if self.told_level else zero, zero + self.classes
        if self.classes and labels is not None:
            label = labels.to(levels.device)
        out = torch.stack([level, label], 1)
        if self.captions is None:
            return out
        if captions is None:
            nothing = NOT_TOLD if self.captions.entries else 0.0
            captions = torch.full((len(levels), self.captions.size), nothing)
        return torch.cat([out.to(captions.dtype), captions.to(levels.device)], 1)

    def unconditional(self, conditions: Tensor) -> Tensor:
        """Conditions with the same levels, without class and caption."""
        out = conditions.clone()
        out[:, 1] = self.classes
        out[:, 2:] = NOT_TOLD if self.captions is not None and self.captions.entries else 0
        return out

    @property
    def shown(self) -> Decoder:
        """The decoder; raises DataError where there is none."""
        if self.decoder is None:
            raise DataError("nothing shows these latents: their encoder has no linear decoder")
        return self.decoder

    # --- models ---------------------------------------------------------------------------------

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> JointEnergy:
        """See `Task`."""
        embeddings = None
        if first:
            condition = ConditionEmbedding(
                config, self.options.condition_vector, self.told_level, self.classes, self.captions
            )
            embeddings = PictureEmbeddings(config, self.channels, kernels, self._places(config), condition)
        return JointEnergy(config, self.recipe, kernels, embeddings, first, last)

    def feed_forward_model(
        self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool
    ) -> DiffusionTransformer:
        """See `Task`: DiT."""
        config.has_cond_embedder = True  # type: ignore[attr-defined]  # of every stage: Megatron sums the gradients
        condition = ConditionEmbedding(
            config, self.options.condition_vector, True, self.classes, self.captions, shared=True
        )
        embedding = LatentEmbedding(config, self.channels, self._places(config)) if first else None
        bounds = {"nats": self.schedule.variational_bound, "bits": self.schedule.bound_in_bits}
        bound = bounds[self.options.sigma_loss] if self.options.learn_sigma else None
        return DiffusionTransformer(
            config,
            self.recipe,
            kernels,
            condition,
            embedding,
            self.channels,
            first,
            last,
            bound,
            signed=self.options.sigma_output == "signed",
        )

    def _places(self, config: TransformerConfig) -> Tensor:
        rows, columns = self.grid
        return positions_2d(rows, columns, config.hidden_size)

    def cost(self) -> Cost:
        """See `Task`."""
        return joint_cost(self.recipe, self.channels * (2 if self.options.learn_sigma else 1))

    # --- evaluation -----------------------------------------------------------------------------

    def meter(self, steps: int, device: torch.device) -> PictureMeter | NoMeter:
        """See `Task`; a DiT is judged by `ebt_megatron.evaluation.pictures`, which runs its passes."""
        if self.decoder is None or self.recipe.model.architecture != "ebt" or not self.denoises:
            return NoMeter()
        return PictureMeter(steps, self.decoder, device)

    def describe(self, loss: float) -> dict[str, float]:
        """A smooth L1 loss, or a DiT's mean squared error of the noise, is what it is."""
        return {}

    def example(self, sample: Sample, thinker: Thinker, steps: int) -> None:
        """Pictures are shown by the report."""


class PictureMeter:
    """Squared errors of pixels after every step, and of the noised pictures.

    Args:
        steps: n.
        decoder: what shows pictures.
        device: of the sums.
    """

    def __init__(self, steps: int, decoder: Decoder, device: torch.device):
        self.decoder = decoder
        self.model, self.noised, self.seen = (torch.zeros(n, dtype=torch.float64, device=device) for n in (steps, 1, 1))

    def watch(self, sample: Sample, valid: Tensor) -> Callable[[Any], None]:
        """See `Meter`."""
        assert sample.start is not None

        def error(latents: Tensor) -> Tensor:
            return self.decoder.squared_error(latents.transpose(0, 1), sample.targets).double()[valid].sum()

        taken = iter(range(len(self.model)))
        self.noised += error(sample.start)
        self.seen += valid.sum()

        def observe(prediction: Any) -> None:
            self.model[next(taken)] += error(prediction.y)

        return observe

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `Meter`: predictions are on the first pipeline stage alone."""
        return [self.noised, self.seen], [self.model]

    def results(self, positions: int, thinks: bool) -> dict[str, Any]:
        """PSNRs of the mean squared error."""
        return {"psnr": psnr(self.model / self.seen).tolist(), "noised_psnr": psnr(self.noised / self.seen).item()}
