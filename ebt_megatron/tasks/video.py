"""Video: the next frame's latents at every frame of a clip, one token a frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe
from ebt_megatron.data.decoder import Decoder, psnr
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.flops import Cost, cost
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.latent_model import LatentEmbedding, LatentEmbeddings, LatentOutput
from ebt_megatron.tasks.latents import check_latents, decoder_of
from ebt_megatron.thinking.dual_stream import Thinker


class Video:
    """Next-frame prediction, a `Task`: a token is a frame, all of its patches' channels one after another.

    Args:
        recipe: the run.
        shape: [patches, channels] of a frame.
        encoder: the SHA-256 of what made the latents.
        decoder: what shows them, or None.

    Raises:
        RecipeError: for settings that are made for logits.
    """

    kind = "video"

    def __init__(self, recipe: Recipe, shape: list[int], encoder: str = "", decoder: Decoder | None = None):
        check_latents(recipe)
        self.recipe, self.shape, self.decoder = recipe, list(shape), decoder
        self.length, self.channels = recipe.data.sequence_length, shape[0] * shape[1]
        self.identity = {"encoder": encoder, "frame": self.shape}

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Video:
        """See `Task`."""
        manifest = source.manifest
        return cls(recipe, manifest.shape[1:], manifest.encoder["sha256"], decoder_of(source))

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        """Every frame but the last is observed, and every one but the first is to be predicted."""
        assert batch.latents is not None
        frames = batch.latents.flatten(2).to(device)
        observed, targets = frames[:, :-1], frames[:, 1:]
        last = self.recipe.thinking.initial == "observed" and self.recipe.model.architecture == "ebt"
        start = observed.transpose(0, 1) if last else None
        return Sample(observed, targets, batch.sample_ids.to(device), start=start)

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> EnergyTransformer:
        """See `Task`."""
        embeddings = LatentEmbeddings(config, self.channels, kernels) if first else None
        return EnergyTransformer(config, self.recipe, kernels, embeddings, first, last)

    def feed_forward_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> TransformerLM:
        """See `Task`: Transformer++ with a linear output and the same loss."""
        embedding = LatentEmbedding(config, self.channels) if first else None
        output = LatentOutput(config, self.channels) if last else None
        return TransformerLM(config, self.recipe, kernels, embedding, output, first, last)

    def cost(self) -> Cost:
        """See `Task`; what is a product with the vocabulary for text is one with the channels of a frame."""
        return cost(self.recipe, self.channels)

    def meter(self, steps: int, device: torch.device) -> VideoMeter:
        """See `Task`."""
        return VideoMeter(steps, self.length, self.shape, self.decoder, device)

    def describe(self, loss: float) -> dict[str, float]:
        """A smooth L1 loss is what it is."""
        return {}

    def example(self, sample: Sample, thinker: Thinker, steps: int) -> None:
        """Clips are shown by `tools.video`."""


def extrapolated(observed: Tensor) -> Tensor:
    """The next frames [B, S, C] if each went on as from the frame before it; the first is repeated."""
    before = torch.cat([observed[:, :1], observed[:, :-1]], 1)
    return 2 * observed - before


class VideoMeter:
    """Losses by step and position in the clip, and pixels where they can be shown; beside two simple predictors.

    These are the last observed frame again, and the last two frames extrapolated.

    Args:
        steps: n.
        length: S.
        shape: [patches, channels] of a frame.
        decoder: what shows frames, or None.
        device: of the sums.
    """

    SIMPLE = ("repeat_last", "extrapolation")

    def __init__(self, steps: int, length: int, shape: list[int], decoder: Decoder | None, device: torch.device):
        self.shape, self.decoder = shape, decoder
        # Of each predictor: losses and squared errors of pixels, [2, S].
        self.simple, self.model = (
            torch.zeros(n, 2, length, dtype=torch.float64, device=device) for n in (len(self.SIMPLE), steps)
        )
        self.seen = torch.zeros(1, dtype=torch.float64, device=device)

    def _errors(self, predicted: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Losses and squared errors of pixels summed over samples, [2, S], of frames [B, S, C]."""
        loss = F.smooth_l1_loss(predicted, targets, reduction="none").mean(-1)
        pixels = torch.zeros_like(loss)
        if self.decoder is not None:
            frames = (t.unflatten(-1, self.shape) for t in (predicted, targets))
            pixels = self.decoder.squared_error(*frames)
        return torch.stack([t.double()[valid].sum(0) for t in (loss, pixels)])

    def watch(self, sample: Sample, valid: Tensor) -> Callable[[Any], None]:
        """See `Meter`."""
        targets, taken = sample.targets, iter(range(len(self.model)))
        for sums, predicted in zip(self.simple, (sample.observed, extrapolated(sample.observed)), strict=True):
            sums += self._errors(predicted, targets, valid)
        self.seen += valid.sum()

        def observe(prediction: Any) -> None:
            predicted = prediction.y.transpose(0, 1)
            self.model[next(taken)] += self._errors(predicted, targets.to(predicted.dtype), valid)

        return observe

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `Meter`: predictions are on one pipeline stage alone."""
        return [self.simple, self.seen], [self.model]

    def results(self, positions: int, thinks: bool) -> dict[str, Any]:
        """Losses and PSNRs (of the mean squared error); by position, lists over the clip."""
        simple, model = self.simple / self.seen, self.model / self.seen
        out: dict[str, Any] = {f"{n}_loss": v for n, v in zip(self.SIMPLE, simple[:, 0].mean(-1).tolist(), strict=True)}
        by_position = dict(zip(self.SIMPLE, simple[:, 0].tolist(), strict=True))
        out["loss_by_position"] = by_position | {"steps": model[:, 0].tolist()}
        if self.decoder is not None:
            ratios = psnr(simple[:, 1].mean(-1)).tolist()
            out |= {f"{n}_psnr": v for n, v in zip(self.SIMPLE, ratios, strict=True)}
            out["psnr"] = psnr(model[:, 1].mean(-1)).tolist()
        return out
