"""What thinking needs of a model and of a modality.

Shapes: numbers per position are [S, B]; hidden states [S(/TP), B, D], of this rank's positions under sequence
parallelism. The state y itself may have any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ebt_megatron.model.reuse import Tape
from ebt_megatron.parallel.collectives import TensorGroup

KeyValues = Sequence[tuple[Tensor, Tensor]]


class EnergyModel(Protocol):
    """One pipeline stage of an energy (`ebt_megatron.model.energy.EnergyTransformer`, say).

    Attributes:
        config: Megatron's.
        separable: whether the energy E = sum_t E_t of a sample has an E_t for each position that depends on the
            prediction at t alone, as in autoregressive models. Where predictions see each other it is not: see
            `ebt_megatron.thinking.dual_stream.split_factor`.
        context_sees_step: whether the context must be computed anew for each thinking step.
        step_tokens: how many positions the step itself takes before the sequence.
        context_rows: how many rows the context stream has where they are not the sample's positions (a condition: 1),
            whole on every rank; else None.
        starts_thinking: whether an output on the context stream says where thinking starts, as with
            `thinking.initial=context`.
    """

    config: TransformerConfig

    @property
    def separable(self) -> bool: ...  # noqa: D102
    @property
    def context_sees_step(self) -> bool: ...  # noqa: D102
    @property
    def step_tokens(self) -> int: ...  # noqa: D102
    @property
    def context_rows(self) -> int | None: ...  # noqa: D102
    @property
    def starts_thinking(self) -> bool: ...  # noqa: D102

    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102

    def context(self, h: Tensor, length: int, segments: Tensor | None, step: int = 0) -> tuple[Tensor, KeyValues]:
        """Run the context stream: hidden states in and out, and what each layer's prediction stream reads of it."""
        ...

    def read_out(self, h: Tensor) -> Tensor:
        """What the output on the context stream reads of its last hidden states [S(/TP), B, D]; on the first stage."""
        ...

    def predict(
        self,
        h: Tensor,
        key_values: KeyValues,
        length: int,
        segments: Tensor | None,
        step: int,
        tangent: bool,
        tape: Tape | None = None,
    ) -> Tensor:
        """Run the prediction stream, with `tangent` stacked behind it ([S(/TP), 2B, D]).

        On the last stage: energies [S(/TP), B] whose sum over positions is the sample's, with `tangent` their
        tangents.
        """
        ...


class Prediction(Protocol):
    """The state y of a micro-batch of predictions: where it starts, how it enters the model, steps and is judged.

    With `thinking.initial=context` `Descent` calls `begin` before anything else, and in training detached between steps
    `begin_backward` next. It calls, for each step, `perturb`, `embed`, `refine`; then `slope`, `tangent` and
    `backward` if the step is learned from; then `advance`. To train through steps it advances to the end, and goes
    back with `begin_adjoint`.

    With s what the energy's gradient is taken by and b where a step starts, the step is y' = b(y) - alpha g,
    g = dE/ds; lambda stands for dloss/dy'.

    Attributes:
        group: the tensor-parallel group.
        y: the current state, where it is stored.
    """

    group: TensorGroup
    y: Tensor | None

    # --- the start, where the context says it -------------------------------------------------

    def begin(self, hidden: Tensor) -> Tensor:
        """Start at what the output makes of the context's hidden states [S(/TP), B, D].

        Returns:
            The loss of the start per position, [S, B].
        """
        ...

    def begin_backward(self, weight: Tensor) -> Tensor:
        """Take the gradient of that loss, weighted by [S, B], to the output.

        Returns:
            The gradient by the hidden states, [S(/TP), B, D].
        """
        ...

    # --- a step ---------------------------------------------------------------------------

    def perturb(self, step: int) -> None:
        """Add the noise before step `step`."""
        ...

    def embed(self) -> Tensor:
        """The model's input for the current state, [S(/TP), B, D]."""
        ...

    def refine(self, energy_grad: Tensor, alpha: Tensor) -> Tensor:
        """Form the next state y', which `advance` makes the current one.

        Args:
            energy_grad: dE/dx at the embedded state, [S(/TP), B, D].
            alpha: step size per position, [S, B].

        Returns:
            The loss of y' per position, [S, B].
        """
        ...

    def slope(self) -> Tensor:
        """<lambda, g> per position [S, B]: minus the loss's derivative by alpha."""
        ...

    def tangent(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The direction to learn along, weight * lambda, as a direction of about unit length and a length.

        Args:
            weight: of each position's loss, [S, B].

        Returns:
            The directions' embedding [S(/TP), B, D], and their lengths [S, B].
        """
        ...

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """Add the embedding's gradient, given those at what `embed` and `tangent` returned, [S(/TP), B, D]."""
        ...

    def advance(self, keep: bool) -> None:
        """End the step: y' becomes the current state. With `keep`, the adjoint can come back before it."""
        ...

    @property
    def final(self) -> Tensor:
        """The state at the end of thinking, [S, B, ...], from which a replayed sample starts."""
        ...

    def begin_adjoint(self) -> PredictionAdjoint:
        """The way back through the steps, after the last `advance`; the adjoint is zero."""
        ...

    # --- for the judge ----------------------------------------------------------------------

    def plain(self) -> PlainPrediction:
        """The same state as functions in plain torch."""
        ...


class PredictionAdjoint(Protocol):
    """dL/dy, carried back through the steps of a `Prediction` whose state it rewinds.

    For each step from the last: `add_loss_gradient`, `rewind`, `slope`; then the prediction's `embed`, and `tangent`
    and `backward`, if its energy is learned from, else `past`.
    """

    def add_loss_gradient(self, step: int, weight: Tensor) -> None:
        """+= weight * dloss/dy at the state that step `step` ended with; weight [S, B]."""
        ...

    def rewind(self, step: int) -> None:
        """Return to the state that step `step` began with, its noise included; the adjoint is still that by y'."""
        ...

    def slope(self) -> Tensor:
        """<adjoint, g> of the rewound step, [S, B]."""
        ...

    def tangent(self) -> tuple[Tensor, Tensor]:
        """Give the direction to learn along as `Prediction.tangent` does, along the adjoint."""
        ...

    def backward(self, x_grad: Tensor, xt_grad: Tensor) -> None:
        """Do what `Prediction.backward` does; the adjoint becomes that by y: through b, `embed` and `tangent`."""
        ...

    def past(self) -> None:
        """The adjoint becomes that by y where g is a constant: through b alone."""
        ...

    def begin_backward(self, weight: Tensor) -> Tensor:
        """Do what `Prediction.begin_backward` does, along the adjoint as well, which is that by the start."""
        ...


class PlainPrediction(Protocol):
    """A prediction for `ebt_megatron.thinking.double_backward`: differentiable functions of y, on one process."""

    start: Tensor

    def begin(self, hidden: Tensor) -> Tensor:
        """The start that the output makes of the context's hidden states [S, B, D]."""
        ...

    def perturb(self, y: Tensor, step: int) -> Tensor:
        """Y with the noise before step `step`."""
        ...

    def step(
        self, y: Tensor, alpha: Tensor, energies: Callable[[Tensor], Tensor], create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """A step from y, which requires a gradient.

        Args:
            y: the state.
            alpha: step size per position, [S, B].
            energies: of an embedded state [S, B, D], [S, B].
            create_graph: whether the energy's gradient can be differentiated.

        Returns:
            y' and the energies at y.
        """
        ...

    def loss(self, y: Tensor) -> Tensor:
        """Per position, [S, B]."""
        ...
