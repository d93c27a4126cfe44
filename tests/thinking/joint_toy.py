"""A bidirectional energy of a few numbers per position: predictions see each other, so the energy is joint.

`JointToy` is an `EnergyModel` of Megatron's parallel layers, `LatentPrediction` a state that is its own values with a
smooth L1 loss, and `plain_energies` the same energy for the judge, in formulas of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from ebt_megatron import kernels as kernel_backends
from ebt_megatron.core.randomness import stable_seed
from ebt_megatron.model.initialization import named_weights
from ebt_megatron.model.layers import modulate
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import cut_dimension, gradient_buffer, mark_tensor_parallel, replicated
from ebt_megatron.parallel.setup import transformer_config
from tests import builders

CHANNELS, WIDTH, HEADS, LAYERS = 3, 16, 2, 2


def recipe(*overrides: str):
    sizes = f"model.num_layers={LAYERS}", f"model.hidden_size={WIDTH}", f"model.num_attention_heads={HEADS}"
    return builders.small_recipe(*sizes, "model.num_query_groups=2", *overrides)


def normalised(kernels, h, tangent):
    """LayerNorm alone: no condition of a sample acts on it."""
    nothing = h.new_zeros(1, WIDTH)
    return kernels.layer_norm(h, 1e-5, nothing, nothing, tangent=tangent)


class JointLayer(MegatronModule):
    """Attention of every prediction to every other, and an MLP; the context shifts and scales its position's."""

    def __init__(self, config):
        super().__init__(config)
        options = {"config": config, "init_method": config.init_method, "bias": False}
        rows = {**options, "input_is_parallel": True, "skip_bias_add": True}
        self.kernels = kernel_backends.select("torch")
        self.mix = replicated(torch.empty(WIDTH, WIDTH, dtype=config.params_dtype), config)
        self.modulation = replicated(torch.empty(2 * WIDTH, WIDTH, dtype=config.params_dtype), config)
        self.qkv = ColumnParallelLinear(WIDTH, 3 * WIDTH, gather_output=False, **options)
        self.proj = RowParallelLinear(WIDTH, WIDTH, **rows)
        self.fc1 = ColumnParallelLinear(WIDTH, 2 * WIDTH, gather_output=False, **options)
        self.fc2 = RowParallelLinear(2 * WIDTH, WIDTH, **rows)

    def context(self, h):
        h = h + torch.tanh(h @ self.mix.T)
        return h, (h @ self.modulation.T).chunk(2, -1)

    def predict(self, h, shift_and_scale, tangent, tape):
        def linear(name, x):
            layer = getattr(self, name)
            return layer(x)[0] if tape is None else tape.apply(f"{id(self)}.{name}", layer, x, tangent)

        mixed = linear("qkv", modulate(normalised(self.kernels, h, tangent), *shift_and_scale, tangent))
        no_bias = mixed.new_zeros(mixed.shape[-1])
        h = h + linear("proj", self.kernels.full_attention(mixed, no_bias, WIDTH // HEADS, tangent=tangent))
        hidden = linear("fc1", normalised(self.kernels, h, tangent))
        return h + linear("fc2", self.kernels.gelu(hidden, hidden.new_zeros(hidden.shape[-1]), tangent=tangent))


class JointToy(MegatronModule):
    """This stage's part, in float64, with weights that no layout changes."""

    separable = False
    context_sees_step = False
    context_rows = None
    starts_thinking = False
    step_tokens = 0

    def __init__(self, recipe):
        config = transformer_config(recipe)
        config.params_dtype = torch.float64
        super().__init__(config)
        self.first, self.last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        if self.first:
            self.embedding = nn.Parameter(torch.empty(WIDTH, CHANNELS, dtype=config.params_dtype))
            self.condition = replicated(torch.empty(WIDTH, CHANNELS, dtype=config.params_dtype), config)
            self.step_size = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.layers = nn.ModuleList(JointLayer(config) for _ in range(LAYERS // recipe.parallel.pipeline))
        if self.last:
            self.head = replicated(torch.empty(WIDTH, dtype=config.params_dtype), config)
        mark_tensor_parallel(self)
        for name, parameter in named_weights(self):
            if parameter.dim():
                whole = parameter.detach().new_empty(self.whole_shape(parameter))
                whole.normal_(generator=torch.Generator().manual_seed(stable_seed(name)))
                parameter.data.copy_(self.part(whole, parameter) / math.sqrt(whole.shape[-1]))

    @staticmethod
    def whole_shape(parameter):
        shape = list(parameter.shape)
        if (dim := cut_dimension(parameter)) is not None:
            shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
        return shape

    @staticmethod
    def part(whole, parameter):
        """What this rank holds of a whole weight, or of its gradient."""
        if (dim := cut_dimension(parameter)) is None:
            return whole
        size, rank = TensorGroup().size, TensorGroup().rank
        return whole.chunk(size, dim)[rank]

    def context(self, h, length, segments, step=0):
        read = []
        for layer in self.layers:
            h, modulation = layer.context(h)
            read.append(modulation)
        return h, read

    def predict(self, h, key_values, length, segments, step, tangent, tape=None):
        for layer, modulation in zip(self.layers, key_values, strict=True):
            h = layer.predict(h, modulation, tangent, tape)
        if not self.last:
            return h
        n = normalised(self.layers[0].kernels, h, tangent)
        return (n.chunk(2, 1)[1] if tangent else n) @ self.head


def plain_energies(model: JointToy, observed: Tensor, step: int, x: Tensor) -> Tensor:
    """Energies [S, B] of embedded predictions x [S, B, D], given observed values [S, B, C]."""
    norm = lambda h: F.layer_norm(h, (WIDTH,))  # noqa: E731
    context = observed @ model.condition.T
    for layer in model.layers:
        context = context + torch.tanh(context @ layer.mix.T)
        shift, scale = (context @ layer.modulation.T).chunk(2, -1)
        q, k, v = F.linear(norm(x) * (1 + scale) + shift, layer.qkv.weight).unflatten(-1, (HEADS, 3, -1)).unbind(3)
        scores = torch.einsum("sbnh,tbnh->bnst", q, k) / math.sqrt(q.shape[-1])
        x = x + F.linear(torch.einsum("bnst,tbnh->sbnh", scores.softmax(-1), v).flatten(2), layer.proj.weight)
        x = x + F.linear(F.gelu(F.linear(norm(x), layer.fc1.weight), approximate="tanh"), layer.fc2.weight)
    return norm(x) @ model.head


class LatentPrediction:
    """A `Prediction` of C numbers per position: x = W y, y' = y - alpha dE/dy, smooth L1 loss (the mean over C).

    Args:
        weight: W [D, C].
        start, target: [S, B, C].
        group: the tensor-parallel group.
    """

    def __init__(self, weight: nn.Parameter, start: Tensor, target: Tensor, group: TensorGroup):
        self.weight, self.y, self.target, self.start, self.group = weight, start, target, start, group
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []  # of each step: y, g, y'

    def perturb(self, step):
        """There is no noise."""

    def _embed(self, values):
        return self.group.own_positions(values @ self.weight.detach().T)

    def embed(self):
        return self._embed(self.y)

    def _loss_gradient(self, y):
        return (y - self.target).clamp(-1, 1) / CHANNELS

    def refine(self, energy_grad, alpha):
        self.g = self.group.from_hidden(energy_grad) @ self.weight.detach()
        self.next = self.y - alpha[..., None] * self.g
        return F.smooth_l1_loss(self.next, self.target, reduction="none").mean(-1)

    def slope(self):
        return (self._loss_gradient(self.next) * self.g).sum(-1)

    def _direction(self, gradient):
        norm = gradient.norm(dim=-1).clamp_min(1e-30)
        self.direction = gradient / norm[..., None]
        return self._embed(self.direction), norm

    def tangent(self, weight):
        return self._direction(weight[..., None] * self._loss_gradient(self.next))

    def backward(self, x_grad, xt_grad):
        for grad, value in ((x_grad, self.y), (xt_grad, self.direction)):
            gradient_buffer(self.weight).add_(torch.einsum("sbd,sbc->dc", self.group.from_hidden(grad), value))

    def advance(self, keep):
        if keep:
            self.history.append((self.y, self.g, self.next))
        self.y = self.next

    @property
    def final(self):
        return self.y

    def begin_adjoint(self):
        return LatentAdjoint(self)

    def plain(self):
        return PlainLatent(self.weight, self.start, self.target)


class LatentAdjoint:
    """Its `PredictionAdjoint`."""

    def __init__(self, prediction):
        self.prediction, self.value = prediction, torch.zeros_like(prediction.y)

    def add_loss_gradient(self, step, weight):
        p = self.prediction
        self.value = self.value + weight[..., None] * p._loss_gradient(p.history[step][2])

    def rewind(self, step):
        self.prediction.y, self.prediction.g, _ = self.prediction.history[step]

    def slope(self):
        return (self.value * self.prediction.g).sum(-1)

    def tangent(self):
        return self.prediction._direction(self.value)

    def backward(self, x_grad, xt_grad):
        p = self.prediction
        p.backward(x_grad, xt_grad)
        self.value = self.value + p.group.from_hidden(x_grad) @ p.weight.detach()

    def past(self):
        """A step starts at y itself."""


class PlainLatent:
    """The same for the judge."""

    def __init__(self, weight, start, target):
        self.weight, self.start, self.target = weight, start, target

    def perturb(self, y, step):
        return y.clone()

    def step(self, y, alpha, energies, create_graph):
        energy = energies(y @ self.weight.T)
        (gradient,) = torch.autograd.grad(energy.sum(), y, create_graph=create_graph, retain_graph=True)
        return y - alpha[..., None] * gradient, energy

    def loss(self, y):
        return F.smooth_l1_loss(y, self.target, reduction="none").mean(-1)
