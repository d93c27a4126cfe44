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

With `thinking.initial=context` y_0 is what an output on the context stream gives, with a loss of its own. Its gradient,
and in training through several steps the adjoint that arrives at y_0, go back into that output and the context.

The factors of a position (alpha, its weight in the loss, lambda's length) stand before lambda,
on the tangent. Where a position's energy depends on its own prediction alone they may stand
before its energy instead, and do: `split_factor`.

This file is the whole algorithm. It knows nothing of text, video or images: a
*prediction* (`ebt_megatron.prediction.interface`) holds y and answers for its embedding, its
update and its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.core.randomness import STEP_SIZE_STREAM, uniform
from ebt_megatron.model.reuse import Tape
from ebt_megatron.parallel.collectives import TensorGroup
from ebt_megatron.parallel.parameters import gradient_buffer
from ebt_megatron.prediction.interface import EnergyModel, Prediction, PredictionAdjoint
from ebt_megatron.thinking.plan import Plan


@dataclass
class ThinkingOutput:
    """What came of a micro-batch.

    Attributes:
        losses: [n, S, B] after each step.
        energies: [n, S, B] before it.
        initial: [S, B], the loss where thinking started, if the context said where.
    """

    losses: Tensor
    energies: Tensor
    initial: Tensor | None = None


def step_sizes(
    step_size: Tensor,
    options: ThinkingConfig,
    sample_ids: Tensor,
    length: int,
    seed: int,
    random: bool,
    separable: bool = True,
) -> tuple[Tensor, Tensor]:
    """The step size of each position, and its derivative by the learned scalar; both [S, B].

    alpha = max(step_size, step_size_min) times a factor that is 1, or in training uniform in
    [1/scale, scale] per position; where the positions of a sample share an energy, one for the sample.
    The derivative is that of alpha at its least where step_size is below it: a step size that fell too
    far may rise again.
    """
    alpha = step_size.detach().clamp_min(options.step_size_min)
    factor = torch.ones(length, len(sample_ids), dtype=alpha.dtype, device=alpha.device)
    if random and options.step_size_scale != 1:
        positions = torch.arange(length if separable else 1, device=alpha.device)
        draw = uniform(seed, sample_ids.to(alpha.device), positions, STEP_SIZE_STREAM).to(alpha.dtype)
        low, high = 1 / options.step_size_scale, options.step_size_scale
        factor = (low + (high - low) * draw).expand_as(factor)
    return alpha * factor, factor


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
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Leave parameters out of autograd, so that a backward pass computes no weight gradients."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Descent:
    """The prediction's side of thinking: what goes into each pass of the energy, and what is made of its gradients.

    Args:
        prediction: the state to improve.
        step_size: the learned scalar; its gradient is added up here.
        alpha, alpha_slope: step size per position [S, B] and its derivative by `step_size`.
        plan, weight: for training: what to learn from, and each position's weight [S, B] in the
            loss (usually 1 / the number of positions in the global batch).
        separable: as the model's.
        observe: called with the prediction after each step that is not learned from; before the first as well where it
            starts at the context's.
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
        self.initial: Tensor | None = None  # the loss of the context's own prediction
        self._initial_grad: Tensor  # of that loss, by the context's hidden states
        self._embedded: Tensor  # of the newest step
        self._adjoint: PredictionAdjoint  # on the way back, and the last step whose adjoint is known
        self._adjoint_step: int | None = None
        self._on_tangent: Tensor | None = None  # what `learn_input` multiplied the tangents with, [S(/TP), B, 1]

    @property
    def _through(self) -> bool:
        return self.plan is not None and self.plan.gradient != "detached"

    def begin(self, hidden: Tensor) -> None:
        """Start at what the output gives for the context's hidden states [S(/TP), B, D]."""
        self.initial = self.prediction.begin(hidden)
        if self.observe is not None:
            self.observe(self.prediction)
        if self.plan is not None and not self._through:  # before a step writes over it
            self._initial_grad = self.prediction.begin_backward(self._initial_weight)

    def begin_backward(self) -> Tensor:
        """The gradient by those hidden states, after the last step."""
        assert self.plan is not None
        if not self._through:
            return self._initial_grad
        self._go_back(0)
        if 0 not in self.plan.learned:
            self._adjoint.past()
        return self._adjoint.begin_backward(self._initial_weight)

    @property
    def _initial_weight(self) -> Tensor:
        """Return the weight of each position's loss where thinking starts, [S, B]."""
        assert self.plan is not None and self.plan.initial_weight is not None and self.weight is not None
        return self.plan.initial_weight * self.weight

    def propose_input(self, step: int) -> Tensor:
        """The embedded prediction [S(/TP), B, D] whose energy to descend."""
        self.prediction.perturb(step)
        self._embedded = self.prediction.embed()
        return self._embedded

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
            xt, norm = self._adjoint.tangent()
        else:
            weight = self.plan.step_weights[step] * self.weight
            self._add_step_size_gradient(self.prediction.slope() * weight)
            x = self._embedded
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
            self._adjoint.backward(x_grad, xt_grad)
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
            self._adjoint, self._adjoint_step = self.prediction.begin_adjoint(), self.plan.steps
        while self._adjoint_step > step:
            if self._adjoint_step < self.plan.steps and self._adjoint_step not in self.plan.learned:
                self._adjoint.past()
            self._adjoint_step -= 1
            step_weight = self.plan.step_weights[self._adjoint_step]
            if step_weight:
                self._adjoint.add_loss_gradient(self._adjoint_step, step_weight * self.weight)
            self._adjoint.rewind(self._adjoint_step)
            self._add_step_size_gradient(self._adjoint.slope())

    def _add_step_size_gradient(self, slope: Tensor) -> None:
        """dL/dalpha = -<lambda, g>; slope [S, B] = <lambda, g> per position."""
        if self.step_size.requires_grad:
            gradient_buffer(self.step_size).add_(-(self.alpha_slope * slope).sum())


class Thinker:
    """Thinks, and learns, on one micro-batch on one pipeline stage, which may be the whole model.

    Six passes do all of it, in the order of `Plan.sweeps`: the context, proposals and learn passes, each forward and
    backward; and where thinking starts at the context's prediction two short ones on the first stage, from the
    context's hidden states to that prediction and back. A pass is given what the neighbouring stage hands over, and
    returns what to hand on; at the ends of the pipeline both are None. The prediction, its update and the loss are on
    the first stage, energies on the last. With one stage, `think` and `train` run the passes; with more,
    `ebt_megatron.thinking.pipeline` does.

    The context stream runs once, is read at every step, and is differentiated once; where it depends on the step
    (`EnergyModel.context_sees_step`) it is run anew, and differentiated, for each.

    Args:
        model: this stage of the energy.
        size, length: B samples of S positions.
        segments: int32 [B, S] documents, or None.
        learned: the steps that will be learned from.
        embed_context: on the first stage: returns the embedded context [S(/TP), B, D]; called inside autograd.
        descent: on the first stage: the prediction's side.
        reuse: learn passes take the values' outputs and the tangents' gradients from propose passes.
        phase: a context manager told what is being done ("context", "propose", "learn"), for timing.

    Attributes:
        energies: [S, B] of each step that was proposed, on the last stage.
        weight: [S, B] of each position's energy in the newest learn pass, where it is known.
    """

    def __init__(
        self,
        model: EnergyModel,
        size: int,
        length: int,
        segments: Tensor | None,
        learned: Collection[int] = (),
        embed_context: Callable[[], Tensor] | None = None,
        descent: Descent | None = None,
        reuse: bool = False,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        self.model, self.size, self.length, self.segments = model, size, length, segments
        self.learned, self.embed_context, self._descent, self.phase = learned, embed_context, descent, phase
        self.group, self.device = TensorGroup(bool(model.config.sequence_parallel)), next(model.parameters()).device
        self.tapes = {step: Tape(self.group) for step in learned} if reuse else {}
        self.energies: list[Tensor] = []
        self.weight: Tensor | None = None
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._context: tuple[Tensor, Tensor, list[Tensor], list[Tensor]]  # what went in and out; keys and values, as
        # the stream made them and as the prediction stream reads them
        self._initial: tuple[Tensor, Tensor]  # the context's hidden states, and what the output reads of them
        self._initial_grad: Tensor | None = None  # by the first, where this stage is the whole model
        self._pass: tuple[Tensor, Tensor]  # what went into the last forward pass of the prediction stream, and came out

    @property
    def descent(self) -> Descent:
        """The prediction's side; on the first stage."""
        assert self._descent is not None
        return self._descent

    # --- the passes -------------------------------------------------------------------------

    def context_forward(self, step: int, h: Tensor | None = None) -> Tensor:
        """Run the context stream [S(/TP), B, D]."""
        learn = bool(self.learned)
        with torch.set_grad_enabled(learn):
            if h is None:
                assert self.embed_context is not None
                h = self.embed_context()
            else:
                h.requires_grad_(learn)
            out, key_values = self.model.context(h, self.length, self.segments, step)
        tensors = [t for key_value in key_values for t in key_value]
        self._context = h, out, tensors, [t.detach().requires_grad_(learn) for t in tensors]
        return out

    def context_backward(self, step: int, grad: Tensor | None = None) -> Tensor | None:
        """Send the gradients that keys and values have collected through the context stream."""
        h, out, tensors, leaves = self._context
        del self._context
        pairs = [(t, leaf.grad) for t, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
        if grad is None:
            grad, self._initial_grad = self._initial_grad, None
        if grad is not None:
            pairs.append((out, grad))
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        if not h.is_leaf:
            return None
        return torch.zeros_like(h) if h.grad is None else h.grad  # a stage may read nothing of the context

    def initial_forward(self, step: int, h: Tensor | None = None) -> None:
        """Start at the prediction of the context whose stream ended with h [S(/TP), B, D]."""
        h = (self._context[1] if h is None else h).detach()
        with torch.set_grad_enabled(bool(self.learned)):
            read = self.model.read_out(h.requires_grad_(bool(self.learned)))
        self._initial = h, read
        self.descent.begin(read.detach())

    def initial_backward(self, step: int) -> Tensor:
        """The gradient by what the context's stream ended with."""
        h, read = self._initial
        del self._initial
        read.backward(self.descent.begin_backward().to(read.dtype))
        assert h.grad is not None
        self._initial_grad = h.grad
        return h.grad

    def key_values(self, constant: bool) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer; not `constant`: they collect gradients."""
        leaves = self._context[3]
        tensors = [t.detach() for t in leaves] if constant else leaves
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def _predict(self, x: Tensor, step: int, tangent: bool) -> Tensor:
        x = x.detach().requires_grad_()
        out = self.model.predict(
            x, self.key_values(constant=not tangent), self.length, self.segments, step, tangent, self.tapes.get(step)
        )
        self._pass = x, out
        return out

    def propose_forward(self, step: int, x: Tensor | None = None) -> Tensor:
        """The energy of the prediction [S(/TP), B, D]."""
        with frozen(self._trained), torch.enable_grad():
            return self._predict(self.descent.propose_input(step) if x is None else x, step, tangent=False)

    def propose_backward(self, step: int, grad: Tensor | None = None) -> Tensor | None:
        """The energy's gradient, to the prediction only; and the next prediction."""
        x, energy = self._pass
        if grad is None:
            self.energies.append(self.group.from_hidden(energy.detach()))
            grad = torch.ones_like(energy)
        with frozen(self._trained):  # layers that are computed again
            (x_grad,) = torch.autograd.grad(energy, x, grad)
        if self._descent is None:
            return x_grad
        self._descent.propose_output(step, x_grad)
        return None

    def learn_forward(self, step: int, streams: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """The energy's tangent, of value and tangent stacked [S(/TP), 2B, D], weighted by [S, B]."""
        if streams is None:
            streams, weight = self.descent.learn_input(step)
        self.weight = weight
        if step in self.tapes:
            self.tapes[step].weight = weight
        with torch.enable_grad():
            return self._predict(streams, step, tangent=True)

    def learn_backward(self, step: int, grad: Tensor | None = None) -> Tensor | None:
        """Ordinary gradients, of the weighted energies' tangents."""
        streams, out = self._pass
        if grad is None:
            assert self.weight is not None
            (out * self.group.own_positions(self.weight).to(out.dtype)).sum().backward()
        else:
            torch.autograd.backward(out, grad)
        del self._pass
        assert streams.grad is not None
        if self._descent is None:
            return streams.grad
        self._descent.learn_output(step, streams.grad)
        return None

    # --- all of them, where this stage is the whole model --------------------------------------

    def run(self, sweeps: Iterable[tuple[str, int]]) -> None:
        """Run passes one after the other: (kind, step), as `Plan.sweeps` gives them."""
        for kind, step in sweeps:
            with self.phase(kind.partition("_")[0]):
                getattr(self, kind)(step)

    def think(self, steps: int) -> ThinkingOutput:
        """Think without learning."""
        self.run(Plan.thinking(steps, self.model.starts_thinking).sweeps(self.model.context_sees_step))
        return self.finish(steps)

    def train(self) -> ThinkingOutput:
        """Think and learn: add the gradient of sum_i step_weights[i] <weight, loss_i> to the parameters."""
        plan = self.descent.plan
        assert plan is not None
        self.run(plan.sweeps(self.model.context_sees_step))
        return self.finish(plan.steps)

    def finish(self, steps: int) -> ThinkingOutput:
        """What came of it, after the last pass: losses on the first stage and energies on the last, else zeros."""
        if self._descent is not None:
            with self.phase("learn"):
                self._descent.finish()
        zeros = torch.zeros(steps, self.length, self.size, device=self.device)
        losses = self._descent.losses if self._descent is not None else []
        initial = torch.zeros_like(zeros[0:1].sum(0)) if self.model.starts_thinking else None
        if self._descent is not None and self._descent.initial is not None:
            initial = self._descent.initial
        return ThinkingOutput(
            torch.stack(losses) if losses else zeros, torch.stack(self.energies) if self.energies else zeros, initial
        )
