"""What latents add to a model: the linear map of observed and predicted ones, and the output of Transformer++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.kernels import Kernels
from ebt_megatron.model.initialization import Draw
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import replicated
from ebt_megatron.prediction.latents import LatentMap, LatentPrediction, LatentReadout


class LinearMap(MegatronModule):
    """A weight [rows, columns] and a bias, whole on every rank.

    Args:
        config: Megatron's.
        rows, columns: of the weight.
        bias: whether there is one; else `bias` is None.
    """

    def __init__(self, config: TransformerConfig, rows: int, columns: int, bias: bool = True):
        super().__init__(config)
        self.weight = replicated(torch.empty(rows, columns, dtype=config.params_dtype), config)
        self.draws = {"weight": Draw.xavier(columns, rows)}
        self.bias = replicated(torch.zeros(rows, dtype=config.params_dtype), config) if bias else None
        self.group = TensorGroup(bool(config.sequence_parallel))


class LatentEmbedding(LinearMap):
    """Latents [B, S, C] -> hidden [S(/TP), B, D], by one linear map.

    Args:
        config: Megatron's.
        channels: C.
        places: [S, D] added to what the map gives, which say where in its frame each token is; None: nothing is.
        bias: whether the map has one.
    """

    def __init__(self, config: TransformerConfig, channels: int, places: Tensor | None = None, bias: bool = True):
        super().__init__(config, config.hidden_size, channels, bias)
        self.places = places

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, S, C] -> hidden [S(/TP), B, D]."""
        own = self.group.own_positions(latents.transpose(0, 1)).to(self.weight.dtype)
        x = F.linear(own, self.weight, self.bias)
        return x if self.places is None else x + self.group.own_positions(self.places)[:, None].to(x)


class LatentEmbeddings(LatentEmbedding):
    """The EBT's view of frames, `Embeddings`: one map for observed and predicted alike, as in the paper.

    Args:
        config, channels, places: as `LatentEmbedding`.
        kernels: for the noise.
        output: whether an output on the context stream says where thinking starts.
    """

    def __init__(
        self,
        config: TransformerConfig,
        channels: int,
        kernels: Kernels,
        places: Tensor | None = None,
        output: bool = False,
    ):
        super().__init__(config, channels, places)
        self.kernels = kernels
        self.output = LatentOutput(config, channels) if output else None

    def context(self, observed: Tensor) -> Tensor:
        """See `Embeddings`."""
        return self(observed)

    def prediction(
        self, targets: Tensor, sample_ids: Tensor, thinking: ThinkingConfig, seed: int, start: Tensor | None = None
    ) -> LatentPrediction:
        """See `Embeddings`; `start` is whole."""
        places = None if self.places is None else self.places.to(self.weight.device)
        assert self.bias is not None
        embed, output = LatentMap(self.weight, self.bias, self.group, places), None
        if self.output is not None:
            assert self.output.bias is not None
            output = LatentReadout(self.output.weight, self.output.bias, self.group)
        return LatentPrediction(self.kernels, embed, targets, sample_ids, thinking, seed, start, output)


class LatentOutput(LinearMap):
    """Transformer++'s output: hidden states -> latents, and their smooth L1 loss.

    Args:
        config: Megatron's.
        channels: C.
        maps: 1; or 2: a square one, `inner`, comes before, without a bias.
        bias: whether the map to latents has one.

    Attributes:
        y: [S, B, C] what was predicted last where nothing was learned.
    """

    y: Tensor | None = None

    def __init__(self, config: TransformerConfig, channels: int, maps: int = 1, bias: bool = True):
        width = config.hidden_size
        super().__init__(config, channels, width, bias)
        self.inner = replicated(torch.empty(width, width, dtype=config.params_dtype), config) if maps == 2 else None
        if maps == 2:
            self.draws["inner"] = Draw.xavier(width, width)

    def predicted(self, h: Tensor, start: Tensor | None) -> Tensor:
        """Hidden [S(/TP), B, D] -> latents of this rank's positions [S(/TP), B, C], as changes of `start` if given."""
        h = h if self.inner is None else F.linear(h, self.inner)
        predicted = F.linear(h, self.weight, self.bias)
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        return predicted if start is None else self.group.own_positions(start).to(predicted.dtype) + predicted

    def forward(self, h: Tensor, targets: Tensor, start: Tensor | None = None) -> Tensor:
        """Smooth L1 (beta 1, the mean over C) [S, B] of targets [B, S, C].

        Args:
            h: [S(/TP), B, D].
            targets: [B, S, C].
            start: [S, B, C] that the output is a change of; None: the output is the latents.
        """
        predicted = self.predicted(h, start)
        if not torch.is_grad_enabled():
            self.y = self.group.from_hidden(predicted)
        target = self.group.own_positions(targets.transpose(0, 1)).to(predicted.dtype)
        return self.group.all_positions(F.smooth_l1_loss(predicted, target, reduction="none").mean(-1))
