"""Thinking, and learning to think, with first-order gradients only.

A prediction y is improved by gradient descent on the energy,

    y_{i+1} = y_i - alpha dE/dy(y_i),        i = 0 .. n-1            (propose)

and the parameters are trained so that y_i matches the data. The loss depends on them
through dE/dy; but with lambda = dL/dy_{i+1} held constant,

    d/dtheta <lambda, -alpha dE/dy(y_i)>  =  d/dtheta ( -alpha d/de E(y_i + e lambda) at e = 0 )   (learn)

so one forward pass that carries the tangent lambda beside the value, followed by an
ordinary backward pass, gives the exact gradient (a Hessian-vector product, without second
derivatives anywhere). The same backward pass gives the way back to y_i, for training
through several steps. The context stream depends on no prediction: it runs once, and
is differentiated once, after every step has left its gradient on its keys and values.

This file is the whole algorithm. It knows nothing of text, video or images: a
*prediction* (`ebt_megatron.model.text.TextPrediction`, say) holds y and answers for its
embedding, its update and its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.parallel.collectives import TensorGroup, add_gradient
from ebt_megatron.parallel.randomness import STEP_SIZE_STREAM, draw_integer, uniform


class Prediction(Protocol):
    """What thinking needs of a modality; positions are [S, B], hidden states [S(/TP), B, D]."""

    length: int
    batch: int

    @property
    def embedded(self) -> Tensor: ...  # noqa: D102
    def perturb(self, step: int) -> None: ...  # noqa: D102
    def embed(self) -> Tensor: ...  # noqa: D102
    def refine(self, energy_grad: Tensor, alpha: Tensor) -> Tensor: ...  # noqa: D102
    def slope(self) -> Tensor: ...  # noqa: D102
    def tangent(self, weight: Tensor) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None: ...  # noqa: D102
    def advance(self) -> None: ...  # noqa: D102
    def remember(self) -> None: ...  # noqa: D102
    def begin_adjoint(self) -> None: ...  # noqa: D102
    def add_loss_gradient(self, step: int, weight: Tensor) -> None: ...  # noqa: D102
    def rewind(self, step: int) -> None: ...  # noqa: D102
    def unperturb(self, step: int) -> None: ...  # noqa: D102
    def adjoint_slope(self) -> Tensor: ...  # noqa: D102
    def adjoint_tangent(self) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def adjoint_backward(self, x_grad: Tensor, xt_grad: Tensor, carry: bool) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """How one micro-batch thinks.

    Attributes:
        step_weights: of each step's loss; its length is the number of steps.
        gradient: "detached" (y is a constant between steps), "full" (through every step) or
            "truncated" (through the last step's energy only; the step size sees every step).
    """

    step_weights: tuple[float, ...]
    gradient: str

    @property
    def steps(self) -> int:
        """The number of thinking steps."""
        return len(self.step_weights)

    @classmethod
    def of(cls, options: ThinkingConfig, steps: int) -> Plan:
        """The recipe's plan for `steps` steps."""
        if options.loss == "last":
            return cls((0.0,) * (steps - 1) + (1.0,), options.gradient)
        return cls((1 / steps,) * steps, options.gradient)

    @classmethod
    def draw(cls, options: ThinkingConfig, seed: int, iteration: int) -> Plan:
        """The plan of a training iteration: the number of steps is the same on every rank."""
        return cls.of(options, draw_integer(seed, iteration, options.min_steps, options.max_steps))


@dataclass
class Thought:
    """What came of a micro-batch: losses [n, S, B] after each step, energies [n, S, B] before it."""

    losses: Tensor
    energies: Tensor


def step_sizes(
    step_size: Tensor, options: ThinkingConfig, sample_ids: Tensor, length: int, seed: int, random: bool
) -> tuple[Tensor, Tensor]:
    """The step size of each position, and its derivative by the learned scalar; both [S, B].

    alpha = max(step_size, step_size_min) times a factor that is 1, or in training uniform in
    [1/scale, scale] per position.
    """
    alpha = step_size.detach().clamp_min(options.step_size_min)
    factor = torch.ones(length, len(sample_ids), dtype=alpha.dtype, device=alpha.device)
    if random and options.step_size_scale != 1:
        positions = torch.arange(length, device=alpha.device)
        draw = uniform(seed, sample_ids.to(alpha.device), positions, STEP_SIZE_STREAM).to(alpha.dtype)
        low, high = 1 / options.step_size_scale, options.step_size_scale
        factor = low + (high - low) * draw
    return alpha * factor, factor * (step_size.detach() >= options.step_size_min)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Leave parameters out of autograd, so that a backward pass computes no weight gradients."""
    live = [p for p in module.parameters() if p.requires_grad]
    for p in live:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in live:
            p.requires_grad_(True)


class Context:
    """The context stream of a micro-batch: run once, read at every step, differentiated once.

    Where the context itself depends on the step (`time_embed_sequence`), it is run anew,
    and differentiated, for each step.

    Args:
        model: an EnergyTransformer.
        embed: returns the embedded context [S(/TP), B, D]; called inside autograd.
        length, segments: as EnergyTransformer.context takes them.
        learn: whether gradients will be asked for.
    """

    def __init__(
        self, model: Any, embed: Callable[[], Tensor], length: int, segments: Tensor | None, learn: bool
    ):
        self.model, self.embed, self.learn = model, embed, learn
        self.length, self.segments = length, segments
        self.step: int | None = None
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def run(self, step: int) -> None:
        """Compute the context for `step`, unless it is at hand."""
        if self.step is not None and (self.step == step or not self.model.context_sees_step):
            return
        self.backward()
        with torch.set_grad_enabled(self.learn):
            _, key_values = self.model.context(self.embed(), self.length, self.segments, step)
        self.outputs = [t for key_value in key_values for t in key_value]
        self.leaves = [t.detach().requires_grad_(self.learn) for t in self.outputs]
        self.step = step

    def key_values(self, step: int, constant: bool) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer for `step`; not `constant`: they collect gradients."""
        self.run(step)
        tensors = [t.detach() for t in self.leaves] if constant else self.leaves
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def backward(self) -> None:
        """Send the collected gradients through the context stream."""
        pairs = [(o, leaf.grad) for o, leaf in zip(self.outputs, self.leaves, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        self.outputs, self.leaves, self.step = [], [], None


class Thinker:
    """Thinks, and learns, on one micro-batch.

    Args:
        model: an EnergyTransformer that is the whole model (one pipeline stage).
        context: its context stream.
        prediction: the state to improve.
        alpha, alpha_slope: step size per position [S, B] and its derivative by model.step_size.
        phase: a context manager told what is being done ("context", "propose", "learn"), for timing.
    """

    def __init__(
        self,
        model: Any,
        context: Context,
        prediction: Prediction,
        alpha: Tensor,
        alpha_slope: Tensor,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.model, self.context, self.prediction, self.phase = model, context, prediction, phase
        self.alpha, self.alpha_slope = alpha, alpha_slope
        self.group = TensorGroup(bool(model.config.sequence_parallel))

    def _energy(self, x: Tensor, step: int, tangent: bool) -> Tensor:
        key_values = self.context.key_values(step, constant=not tangent)
        return self.model.predict(x, key_values, self.context.length, self.context.segments, step, tangent)

    def propose(self, step: int) -> tuple[Tensor, Tensor]:
        """Improve the prediction once; nothing is learned.

        Returns:
            The loss after the step and the energy before it, [S, B].
        """
        with self.phase("context"):
            self.context.run(step)
        with self.phase("propose"):
            self.prediction.perturb(step)
            x = self.prediction.embed().detach().requires_grad_()
            with frozen(self.model), torch.enable_grad():
                energy = self._energy(x, step, tangent=False)
                (energy_grad,) = torch.autograd.grad(energy.sum(), x)
            loss = self.prediction.refine(energy_grad, self.alpha)
            return loss, self.group.from_hidden(energy.detach())

    def learn(self, step: int, x: Tensor, xt: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiate -alpha * norm * dE(x + e xt)/de: one forward and one backward pass.

        Args:
            step: which landscape.
            x, xt: embedded value and unit tangent [S(/TP), B, D].
            norm: what the tangent was divided by, [S, B].

        Returns:
            Gradients at x and xt. Parameters and the context's keys and values collect theirs.
        """
        streams = torch.cat([x, xt], 1).detach().requires_grad_()
        energy_tangent = self._energy(streams, step, tangent=True)
        weight = self.group.own_positions(-self.alpha * norm).to(energy_tangent.dtype)
        (energy_tangent * weight).sum().backward()
        assert streams.grad is not None
        x_grad, xt_grad = streams.grad.chunk(2, 1)
        return x_grad, xt_grad

    def add_step_size_gradient(self, slope: Tensor, weight: Tensor | float) -> None:
        """dL/dalpha = -<lambda, g>, summed over positions; slope = <lambda, g> / weight, [S, B]."""
        if self.model.step_size.requires_grad:
            add_gradient(self.model.step_size, -(self.alpha_slope * slope * weight).sum())

    def think(self, steps: int) -> Thought:
        """Think without learning."""
        losses, energies = [], []
        for step in range(steps):
            loss, energy = self.propose(step)
            self.prediction.advance()
            losses.append(loss)
            energies.append(energy)
        return Thought(torch.stack(losses), torch.stack(energies))

    def train(self, plan: Plan, weight: Tensor) -> Thought:
        """Think and learn: add the gradient of sum_i step_weights[i] <weight, loss_i>.

        Args:
            plan: steps, their weights and how far gradients go.
            weight: [S, B] of each position's loss (usually mask / number of tokens in the global batch).
        """
        train = self._train_detached if plan.gradient == "detached" else self._train_through
        thought = train(plan, weight)
        with self.phase("context"):
            self.context.backward()
        return thought

    def _train_detached(self, plan: Plan, weight: Tensor) -> Thought:
        """Each step is learned from at once, and only its own prediction is held."""
        prediction, losses, energies = self.prediction, [], []
        for step, step_weight in enumerate(plan.step_weights):
            loss, energy = self.propose(step)
            losses.append(loss)
            energies.append(energy)
            if step_weight:
                with self.phase("learn"):
                    self.add_step_size_gradient(prediction.slope(), step_weight * weight)
                    xt, norm = prediction.tangent(step_weight * weight)
                    prediction.backward(*self.learn(step, prediction.embedded, xt, norm))  # also advances
            else:
                prediction.advance()
        return Thought(torch.stack(losses), torch.stack(energies))

    def _train_through(self, plan: Plan, weight: Tensor) -> Thought:
        """Think to the end, then go back through the steps carrying the adjoint dL/dy."""
        prediction, losses, energies = self.prediction, [], []
        for step in range(plan.steps):
            loss, energy = self.propose(step)
            prediction.remember()
            prediction.advance()
            losses.append(loss)
            energies.append(energy)
        with self.phase("learn"):
            self._go_back(plan, weight)
        return Thought(torch.stack(losses), torch.stack(energies))

    def _go_back(self, plan: Plan, weight: Tensor) -> None:
        prediction = self.prediction
        prediction.begin_adjoint()
        for step in reversed(range(plan.steps)):
            if plan.step_weights[step]:
                prediction.add_loss_gradient(step, plan.step_weights[step] * weight)
            learned = plan.gradient == "full" or step == plan.steps - 1
            if not learned and not self.model.step_size.requires_grad:
                break
            prediction.rewind(step)
            self.add_step_size_gradient(prediction.adjoint_slope(), 1.0)
            if learned:
                x = prediction.embed()
                xt, norm = prediction.adjoint_tangent()
                gradients = self.learn(step, x, xt, norm)
                prediction.adjoint_backward(*gradients, carry=plan.gradient == "full")
            prediction.unperturb(step)
