"""Video: the next frame's latents at every frame of a clip, one token a frame or k x k of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from ebt_megatron.config import Recipe, RecipeError
from ebt_megatron.config.video import VideoConfig
from ebt_megatron.data.decoder import Decoder, psnr
from ebt_megatron.data.description import Description
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.condition import positions_2d
from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.model.flops import Cost, cost
from ebt_megatron.model.transformer import TransformerLM
from ebt_megatron.tasks.frames import FrameTokens
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.tasks.latent_model import LatentEmbedding, LatentEmbeddings, LatentOutput
from ebt_megatron.tasks.latents import check_latents, decoder_of, encoder_of
from ebt_megatron.thinking.dual_stream import Thinker


class Video:
    """Next-frame prediction, a `Task`.

    Each token of a frame reads all tokens of the frames observed so far and predicts the token of its place in the next
    frame. Predicted tokens do not see each other, so that the energy of a frame is the sum of its tokens' own.

    Args:
        recipe: the run.
        tokens: of a frame.
        encoder: the SHA-256 of what made the latents.
        decoder: what shows them, or None.

    Raises:
        RecipeError: for settings that are made for logits, for one token a frame, or for Transformer++.
    """

    kind = "video"
    evaluation = "ebt_megatron.evaluation.video_evaluation:VideoEvaluation"

    def __init__(self, recipe: Recipe, tokens: FrameTokens, encoder: str = "", decoder: Decoder | None = None):
        check_latents(recipe)
        if tokens.count > 1 and recipe.model.conditioning == "time_embed_sequence":
            raise RecipeError(
                "model.conditioning=time_embed_sequence puts a token before the frames, and is for one "
                "token a frame: set video.tokens_per_side=1, or another conditioning"
            )
        self.recipe, self.tokens, self.decoder = recipe, tokens, decoder
        self.length = recipe.data.sequence_length * tokens.count
        self.identity: dict[str, Any] = {"encoder": encoder, "frame": [tokens.rows * tokens.columns, tokens.channels]}
        if tokens.count > 1:
            self.identity["video.tokens_per_side"] = tokens.side
        thinks = recipe.model.architecture == "ebt"
        if thinks and not recipe.thinking.starts_at_context:
            change = recipe.thinking.initial == "observed"
        else:
            change = recipe.video.predicts == "change"
        self.from_last = change  # predictions go out from the last frame that is observed
        if change and recipe.thinking.initial != "observed":
            self.identity["video.predicts"] = "change"
        for key in ("output_maps", "map_biases"):
            given = getattr(recipe.video, key)
            if given == getattr(VideoConfig, key):
                continue
            if thinks:
                raise RecipeError(
                    f"video.{key}={given} is about Transformer++: leave it out, or set model.architecture=baseline"
                )
            self.identity[f"video.{key}"] = given

    @classmethod
    def from_data(cls, recipe: Recipe, source: Description) -> Video:
        """See `Task`."""
        if recipe.thinking.starts_near_answer:
            raise RecipeError("thinking.starts_near_answer is for puzzles and images, data.modality is video: set 0")
        encoder, (_, _, channels) = encoder_of(source), source.manifest.shape
        rows, columns = (encoder[side] // encoder["patch"] for side in ("height", "width"))
        tokens = FrameTokens(rows, columns, channels, recipe.video.tokens_per_side)
        return cls(recipe, tokens, encoder["sha256"], decoder_of(source))

    @classmethod
    def of_size(cls, recipe: Recipe, vocab_size: int, channels: int) -> Video:
        """See `Task`; `channels` are the numbers of a token."""
        side = recipe.video.tokens_per_side
        return cls(recipe, FrameTokens(side, side, channels, side))

    def made_up(self, sample_ids: Tensor) -> MicroBatch:
        """See `Task`."""
        patches = self.tokens.rows * self.tokens.columns
        frames = self.recipe.data.sequence_length + 1
        return MicroBatch(sample_ids, torch.zeros(len(sample_ids), frames, patches, self.tokens.channels))

    def sample(self, batch: MicroBatch, device: torch.device) -> Sample:
        """Every frame but the last is observed, and every one but the first is to be predicted."""
        assert batch.samples is not None
        tokens = self.tokens.split(batch.samples.to(device))
        observed, targets = tokens[:, : self.length], tokens[:, self.tokens.count :]
        start = observed.transpose(0, 1) if self.from_last else None
        return Sample(observed, targets, batch.sample_ids.to(device), start=start)

    def _places(self, width: int) -> Tensor | None:
        """Return where each token is in its frame, [S, D]; None where a frame is one token."""
        if self.tokens.count == 1:
            return None
        return positions_2d(self.tokens.side, self.tokens.side, width).repeat(self.recipe.data.sequence_length, 1)

    def energy_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> EnergyTransformer:
        """See `Task`."""
        places = self._places(config.hidden_size)
        output = self.recipe.thinking.starts_at_context
        embeddings = LatentEmbeddings(config, self.tokens.size, kernels, places, output) if first else None
        return EnergyTransformer(config, self.recipe, kernels, embeddings, first, last, self.tokens.count)

    def feed_forward_model(self, config: TransformerConfig, kernels: Kernels, first: bool, last: bool) -> TransformerLM:
        """See `Task`: Transformer++ with a linear output and the same loss."""
        options, places = self.recipe.video, self._places(config.hidden_size)
        embedding = LatentEmbedding(config, self.tokens.size, places, options.map_biases) if first else None
        output = LatentOutput(config, self.tokens.size, options.output_maps, options.map_biases) if last else None
        return TransformerLM(config, self.recipe, kernels, embedding, output, first, last, self.tokens.count)

    def cost(self) -> Cost:
        """See `Task`; what is a product with the vocabulary for text is one with the channels of a token."""
        made = cost(self.recipe, self.tokens.size, self.tokens.count, distribution=False)
        square = (self.recipe.video.output_maps - 1) * (self.recipe.model.hidden_size or 0) ** 2
        return replace(made, layers=made.layers + 2 * self.length * square, parameters=made.parameters + square)

    def meter(self, steps: int, device: torch.device) -> VideoMeter:
        """See `Task`."""
        return VideoMeter(steps, self.recipe.data.sequence_length, self.tokens, self.decoder, device)

    def describe(self, loss: float) -> dict[str, float]:
        """A smooth L1 loss is what it is."""
        return {}

    def example(self, sample: Sample, thinker: Thinker, steps: int) -> None:
        """Clips are shown by the report."""


def extrapolated(observed: Tensor) -> Tensor:
    """The next frames [B, F, ...] if each went on as from the frame before it; the first is repeated."""
    before = torch.cat([observed[:, :1], observed[:, :-1]], 1)
    return 2 * observed - before


class VideoMeter:
    """Losses by step and position in the clip, and pixels where they can be shown; beside two simple predictors.

    These are the last observed frame again, and the last two frames extrapolated.

    Args:
        steps: n.
        length: F, the frames predicted.
        tokens: of a frame.
        decoder: what shows frames, or None.
        device: of the sums.
    """

    SIMPLE = ("repeat_last", "extrapolation")

    def __init__(self, steps: int, length: int, tokens: FrameTokens, decoder: Decoder | None, device: torch.device):
        self.tokens, self.decoder = tokens, decoder
        # Of each predictor: losses and squared errors of pixels, [2, F].
        self.simple, self.model = (
            torch.zeros(n, 2, length, dtype=torch.float64, device=device) for n in (len(self.SIMPLE), steps)
        )
        self.seen = torch.zeros(1, dtype=torch.float64, device=device)

    def _errors(self, predicted: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Losses and squared errors of pixels summed over samples, [2, F], of frames [B, F, patches, channels]."""
        loss = F.smooth_l1_loss(predicted, targets, reduction="none").mean((-1, -2))
        pixels = torch.zeros_like(loss) if self.decoder is None else self.decoder.squared_error(predicted, targets)
        return torch.stack([t.double()[valid].sum(0) for t in (loss, pixels)])

    def watch(self, sample: Sample, valid: Tensor) -> Callable[[Any], None]:
        """See `Meter`."""
        observed, targets = self.tokens.join(sample.observed), self.tokens.join(sample.targets)
        taken = iter(range(len(self.model)))
        for sums, predicted in zip(self.simple, (observed, extrapolated(observed)), strict=True):
            sums += self._errors(predicted, targets, valid)
        self.seen += valid.sum()

        def observe(prediction: Any) -> None:
            predicted = self.tokens.join(prediction.y.transpose(0, 1))
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
