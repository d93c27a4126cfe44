"""Thinking, and learning to think, with first-order gradients only.

A prediction y is improved by gradient descent on the energy,

    y_{i+1} = b(y_i) - alpha dE/ds(y_i),        i = 0 .. n-1            (propose)

where s is what the energy's gradient is taken by, and b where the step starts: both y itself, or for
text (`ebt_megatron.kernels.StepRule`) the probabilities p = softmax(y) for one or both. The
parameters are trained so that y_i matches the data. The loss depends on them
through dE/ds; but with lambda = dL/dy_{i+1} held constant,

    d/dtheta <lambda, -alpha dE/ds(y_i)>  =  d/dtheta ( -alpha d/de E(s_i + e lambda) at e = 0 )   (learn)

so one forward pass that carries the tangent lambda beside the value, followed by an
ordinary backward pass, gives the exact gradient (a Hessian-vector product, without second
derivatives anywhere). The same backward pass gives the way back to y_i, for training
through several steps. The context stream depends on no prediction: it runs once, and
is differentiated once, after every step has left its gradient on its keys and values.

The factors of a position (alpha, its weight in the loss, lambda's length) stand before lambda,
on the tangent. Where a position's energy depends on its own prediction alone they may stand
before its energy instead, and do: `split_factor`.

This file is the whole algorithm. It knows nothing of text, video or images: a
*prediction* (`ebt_megatron.thinking.prediction`) holds y and answers for its embedding, its
update and its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.model.reuse import Tape
from ebt_megatron.parallel.collectives import TensorGroup, add_gradient
from ebt_megatron.parallel.randomness import STEP_SIZE_STREAM, uniform
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.thinking.prediction import EnergyModel, Prediction


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


def split_factor(factor: Tensor, separable: bool) -> tuple[Tensor | None, Tensor]:
    """Divide each position's factor between its tangent and its energy.

    A learn pass differentiates the energy along factor_t * d_t. Its result is linear in the direction as a whole, so
    one number per sample may be taken out of a sample's direction and multiplied with its energy. In a separable
    energy each position is a sample of its own in this respect: nothing is left on the tangent, and low precision
    sees directions d_t of unit length only.

    Args:
        factor: [S, B].
        separable: as in `EnergyModel`.

    Returns:
        What the tangents are multiplied with (None: nothing), and what the energies' tangents are, [S, B].
    """
    if separable:
        return None, factor
    largest = factor.abs().amax(0).clamp_min(torch.finfo(factor.dtype).tiny)
    return factor / largest, largest.expand_as(factor)


@contextmanager
def frozen(model: EnergyModel) -> Iterator[None]:
    """Leave parameters out of autograd, so that a backward pass computes no weight gradients."""
    live = [p for p in model.parameters() if p.requires_grad]
    for p in live:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in live:
            p.requires_grad_(True)


class ContextPass:
    """One run of the context stream through a pipeline stage, for all that read its keys and values.

    Args:
        model: the energy.
        h: embedded context on the first stage, else the previous stage's output; [S(/TP), B, D].
        length, segments, step: as `EnergyModel.context` takes them.
        learn: whether gradients will be asked for.

    Attributes:
        out: the stage's output.
    """

    def __init__(self, model: EnergyModel, h: Tensor, length: int, segments: Tensor | None, step: int, learn: bool):
        with torch.set_grad_enabled(learn):
            self.out, key_values = model.context(h, length, segments, step)
        self._tensors = [t for key_value in key_values for t in key_value]
        self._leaves = [t.detach().requires_grad_(learn) for t in self._tensors]

    def key_values(self, constant: bool) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer; not `constant`: they collect gradients."""
        tensors = [t.detach() for t in self._leaves] if constant else self._leaves
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def backward(self, out_grad: Tensor | None = None) -> None:
        """Send the collected gradients, and that at `out` if there is one, through the stage."""
        pairs = [(t, leaf.grad) for t, leaf in zip(self._tensors, self._leaves, strict=True) if leaf.grad is not None]
        if out_grad is not None:
            pairs.append((self.out, out_grad))
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])


class Context:
    """The context stream of a micro-batch: run once, read at every step, differentiated once.

    Where the context itself depends on the step (`time_embed_sequence`, `adaln_sequence`), it is run anew,
    and differentiated, for each step.

    Args:
        model: the energy.
        embed: returns the embedded context [S(/TP), B, D]; called inside autograd.
        length, segments: as `EnergyModel.context` takes them.
        learn: whether gradients will be asked for.
    """

    def __init__(
        self, model: EnergyModel, embed: Callable[[], Tensor], length: int, segments: Tensor | None, learn: bool
    ):
        self.model, self.embed, self.learn = model, embed, learn
        self.length, self.segments = length, segments
        self._at_hand: tuple[int, ContextPass] | None = None

    def run(self, step: int) -> ContextPass:
        """The context for `step`, computed unless it is at hand."""
        if self._at_hand is None or (self.model.context_sees_step and self._at_hand[0] != step):
            self.backward()
            with torch.set_grad_enabled(self.learn):
                h = self.embed()
            self._at_hand = step, ContextPass(self.model, h, self.length, self.segments, step, self.learn)
        return self._at_hand[1]

    def key_values(self, step: int, constant: bool) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer for `step`; not `constant`: they collect gradients."""
        return self.run(step).key_values(constant)

    def backward(self) -> None:
        """Send the collected gradients through the context stream."""
        if self._at_hand is not None:
            self._at_hand[1].backward()
        self._at_hand = None


class Descent:
    """The prediction's side of thinking: what goes into each pass of the energy, and what is made of its gradients.

    Args:
        prediction: the state to improve.
        step_size: the learned scalar; its gradient is added up here.
        alpha, alpha_slope: step size per position [S, B] and its derivative by `step_size`.
        plan, weight: for training: what to learn from, and each position's weight [S, B] in the
            loss (usually 1 / the number of positions in the global batch).
        separable: as the model's.
        observe: called with the prediction after each step that is not learned from.
    """

    def __init__(
        self,
        prediction: Prediction,
        step_size: nn.Parameter,
        alpha: Tensor,
        alpha_slope: Tensor,
        plan: Plan | None = None,
        weight: Tensor | None = None,
        *,
        separable: bool,
        observe: Callable[[Prediction], None] | None = None,
    ):
        self.prediction, self.step_size = prediction, step_size
        self.alpha, self.alpha_slope = alpha, alpha_slope
        self.plan, self.weight, self.separable, self.observe = plan, weight, separable, observe
        self.losses: list[Tensor] = []
        self._adjoint_step: int | None = None  # on the way back: the last step whose adjoint is known
        self._on_tangent: Tensor | None = None  # what `learn_input` multiplied the tangents with, [S(/TP), B, 1]

    @property
    def _through(self) -> bool:
        return self.plan is not None and self.plan.gradient != "detached"

    def propose_input(self, step: int) -> Tensor:
        """The embedded prediction [S(/TP), B, D] whose energy to descend."""
        self.prediction.perturb(step)
        return self.prediction.embed()

    def propose_output(self, step: int, energy_grad: Tensor) -> None:
        """Take the energy's gradient at that input, and form the next prediction."""
        self.losses.append(self.prediction.refine(energy_grad, self.alpha))
        if self._through or self.plan is None or step not in self.plan.learned:
            self.prediction.advance(keep=self._through)
            if self.observe is not None:
                self.observe(self.prediction)

    def learn_input(self, step: int) -> tuple[Tensor, Tensor]:
        """What to differentiate: the weighted sum of energies' tangents.

        Returns:
            Value and scaled tangent, stacked [S(/TP), 2B, D], and each position's weight [S, B].
        """
        assert self.plan is not None and self.weight is not None
        if self._through:
            self._go_back(step)
            x = self.prediction.embed()
            xt, norm = self.prediction.adjoint_tangent()
        else:
            weight = self.plan.step_weights[step] * self.weight
            self._add_step_size_gradient(self.prediction.slope() * weight)
            x = self.prediction.embedded
            xt, norm = self.prediction.tangent(weight)
        on_tangent, on_energy = split_factor(-self.alpha * norm, self.separable)
        if on_tangent is not None:
            self._on_tangent = self.prediction.group.own_positions(on_tangent)[..., None].to(xt.dtype)
            xt = xt * self._on_tangent
        return torch.cat([x, xt], 1).detach(), on_energy

    def learn_output(self, step: int, streams_grad: Tensor) -> None:
        """Take the gradient at the stacked input to the embedding and, in training through steps, to y."""
        assert self.plan is not None
        x_grad, xt_grad = streams_grad.chunk(2, 1)
        if self._on_tangent is not None:
            xt_grad = xt_grad * self._on_tangent
        if self._through:
            self.prediction.adjoint_backward(x_grad, xt_grad)
        else:
            self.prediction.backward(x_grad, xt_grad)
            self.prediction.advance(keep=False)

    def finish(self) -> None:
        """Let the step size see the steps that nothing else is learned from."""
        if self._through and self.step_size.requires_grad:
            self._go_back(0)

    def _go_back(self, step: int) -> None:
        """Carry the adjoint dL/dy back to just after `step`, and return to the prediction before it."""
        assert self.plan is not None and self.weight is not None
        if self._adjoint_step is None:
            self.prediction.begin_adjoint()
            self._adjoint_step = self.plan.steps
        while self._adjoint_step > step:
            if self._adjoint_step < self.plan.steps and self._adjoint_step not in self.plan.learned:
                self.prediction.adjoint_past()
            self._adjoint_step -= 1
            step_weight = self.plan.step_weights[self._adjoint_step]
            if step_weight:
                self.prediction.add_loss_gradient(self._adjoint_step, step_weight * self.weight)
            self.prediction.rewind(self._adjoint_step)
            self._add_step_size_gradient(self.prediction.adjoint_slope())

    def _add_step_size_gradient(self, slope: Tensor) -> None:
        """dL/dalpha = -<lambda, g>; slope [S, B] = <lambda, g> per position."""
        if self.step_size.requires_grad:
            add_gradient(self.step_size, -(self.alpha_slope * slope).sum())


class Thinker:
    """Thinks, and learns, on one micro-batch with the whole model on this pipeline stage.

    `ebt_megatron.parallel.pipeline` does the same with the model split over stages.

    Args:
        model: the energy.
        context: its context stream.
        descent: the prediction's side.
        phase: a context manager told what is being done ("context", "propose", "learn"), for timing.
        reuse: learn passes take the values' outputs and the tangents' gradients from propose passes.
    """

    def __init__(
        self,
        model: EnergyModel,
        context: Context,
        descent: Descent,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
        reuse: bool = False,
    ):
        self.model, self.context, self.descent, self.phase = model, context, descent, phase
        self.group = TensorGroup(bool(model.config.sequence_parallel))
        self.energies: list[Tensor] = []
        plan = descent.plan
        self.tapes = {step: Tape(self.group) for step in plan.learned} if reuse and plan is not None else {}

    def _energy(self, x: Tensor, step: int, tangent: bool) -> Tensor:
        key_values, context = self.context.key_values(step, constant=not tangent), self.context
        tape = self.tapes.get(step)
        return self.model.predict(x, key_values, context.length, context.segments, step, tangent, tape)

    def propose(self, step: int) -> None:
        """Improve the prediction once: a forward pass, and a backward pass to the prediction only."""
        with self.phase("context"):  # outside `frozen`: it is learned from later
            self.context.run(step)
        with self.phase("propose"), frozen(self.model), torch.enable_grad():
            x = self.descent.propose_input(step).detach().requires_grad_()
            energy = self._energy(x, step, tangent=False)
            (energy_grad,) = torch.autograd.grad(energy.sum(), x)
            self.descent.propose_output(step, energy_grad)
        self.energies.append(self.group.from_hidden(energy.detach()))

    def learn(self, step: int) -> None:
        """Learn from a step: a forward pass of value and tangent, and an ordinary backward pass."""
        with self.phase("context"):
            self.context.run(step)
        with self.phase("learn"):
            streams, weight = self.descent.learn_input(step)
            streams.requires_grad_()
            if step in self.tapes:
                self.tapes[step].weight = weight
            energy_tangent = self._energy(streams, step, tangent=True)
            weight = self.group.own_positions(weight).to(energy_tangent.dtype)
            (energy_tangent * weight).sum().backward()
            assert streams.grad is not None
            self.descent.learn_output(step, streams.grad)

    def think(self, steps: int) -> Thought:
        """Think without learning."""
        for step in range(steps):
            self.propose(step)
        return self._thought()

    def train(self) -> Thought:
        """Think and learn: add the gradient of sum_i step_weights[i] <weight, loss_i> to the parameters."""
        plan = self.descent.plan
        assert plan is not None
        for kind, step in plan.passes:
            if kind == "propose":
                self.propose(step)
            else:
                self.learn(step)
        with self.phase("learn"):
            self.descent.finish()
        with self.phase("context"):
            self.context.backward()
        return self._thought()

    def _thought(self) -> Thought:
        return Thought(torch.stack(self.descent.losses), torch.stack(self.energies))
