"""How many steps a micro-batch thinks, which of them it learns from, and in which order."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ebt_megatron.config import ThinkingConfig
from ebt_megatron.core.randomness import draw_integer, draw_subset


@dataclass(frozen=True)
class Plan:
    """How one micro-batch thinks.

    Attributes:
        step_weights: of each step's loss; its length is the number of steps.
        gradient: "detached" (y is a constant between steps), "full" (through every step) or
            "truncated" (through the last step's energy only; the step size sees every step).
        initial_weight: of the loss where thinking starts, if the context says where (`thinking.initial=context`).
    """

    step_weights: tuple[float, ...]
    gradient: str
    initial_weight: float | None = None

    @property
    def steps(self) -> int:
        """The number of thinking steps."""
        return len(self.step_weights)

    @property
    def learned(self) -> tuple[int, ...]:
        """The steps whose energy is learned from, in the order they are."""
        if self.gradient == "detached":
            return tuple(i for i, weight in enumerate(self.step_weights) if weight)
        return tuple(reversed(range(self.steps))) if self.gradient == "full" else (self.steps - 1,)

    @property
    def passes(self) -> list[tuple[str, int]]:
        """What is done, in order: ("propose" or "learn", step).

        Detached, each step is learned from at once, so that its prediction alone is held. Else thinking goes to its
        end first, and then back through the steps.
        """
        if self.gradient != "detached":
            return [("propose", i) for i in range(self.steps)] + [("learn", i) for i in self.learned]
        each = [("propose", "learn") if i in self.learned else ("propose",) for i in range(self.steps)]
        return [(kind, i) for i, kinds in enumerate(each) for kind in kinds]

    def sweeps(self, context_sees_step: bool) -> list[tuple[str, int]]:
        """The sweeps of one micro-batch through the model's stages: (kind, step), in order.

        Args:
            context_sees_step: the context is run anew for each step (and differentiated after it).
        """
        sweeps: list[tuple[str, int]] = []
        at_hand: int | None = None  # the step whose context is
        if self.initial_weight is not None:
            sweeps, at_hand = [("context_forward", 0), ("initial_forward", 0)], 0
        for kind, step in self.passes:
            if at_hand is None or (context_sees_step and at_hand != step):
                sweeps.append(("context_forward", step))
                at_hand = step
            sweeps += [(f"{kind}_forward", step), (f"{kind}_backward", step)]
            if context_sees_step and kind == "learn":
                sweeps.append(("context_backward", step))
                at_hand = None
        if self.learned and self.initial_weight is not None:
            sweeps.append(("initial_backward", 0))
        if self.learned and not context_sees_step:
            sweeps.append(("context_backward", 0))
        return sweeps

    @classmethod
    def thinking(cls, steps: int, from_context: bool = False) -> Plan:
        """Steps that are not learned from, from the context's prediction or not; from it there may be none."""
        return cls((0.0,) * steps, "detached", 0.0 if from_context else None)

    @classmethod
    def of(cls, options: ThinkingConfig, steps: int, drawn: Collection[int] | None = None) -> Plan:
        """The recipe's plan for `steps` steps.

        Args:
            options: the recipe's.
            steps: n.
            drawn: with thinking.loss=every: the steps whose losses are learned from; None: all. Thinking ends with
                the last of them.
        """
        gradient, initial, share = options.gradient, None, 1.0
        if options.starts_at_context:  # the mean of its loss and the steps', weighted
            share = 1 / (1 + options.initial_loss_weight)
            initial = options.initial_loss_weight * share
        elif gradient == "truncated" and options.loss == "last" and not options.learn_step_size:
            gradient = "detached"  # the same, for less: nothing that is learned acts before the last step
        if options.loss == "last":
            return cls((0.0,) * (steps - 1) + (share,), gradient, initial)
        drawn = range(steps) if drawn is None else drawn
        weights = tuple(share / len(drawn) if i in drawn else 0.0 for i in range(max(drawn) + 1))
        return cls(weights, gradient, initial)

    @classmethod
    def draw(cls, options: ThinkingConfig, seed: int, iteration: int) -> Plan:
        """The plan of a training iteration, the same on every rank.

        The number of steps n is drawn from [min_steps, max_steps]. With `learned_steps` = k < n, k of the n losses are,
        each subset with the same probability; weights of 1 / k instead of 1 / n make the gradient's mean over the
        draws that of all losses.
        """
        steps = draw_integer(seed, iteration, options.min_steps, options.max_steps)
        learned = _drawn_losses(options, steps)
        return cls.of(options, steps, draw_subset(seed, iteration, steps, learned) if learned else None)

    @classmethod
    def distribution(cls, options: ThinkingConfig) -> list[tuple[float, Plan]]:
        """What `draw` gives, as (probability, plan): one plan stands for all of the same cost.

        Of the C(n, k) subsets of n steps, C(i, k - 1) have step i as their last.
        """
        out = []
        lengths = range(options.min_steps, options.max_steps + 1)
        for steps in lengths:
            learned = _drawn_losses(options, steps)
            if not learned:
                out.append((1 / len(lengths), cls.of(options, steps)))
                continue
            for last in range(learned - 1, steps):
                share = math.comb(last, learned - 1) / math.comb(steps, learned)
                drawn = range(last + 1 - learned, last + 1)
                out.append((share / len(lengths), cls.of(options, steps, drawn)))
        return out


def _drawn_losses(options: ThinkingConfig, steps: int) -> int:
    """How many losses of `steps` steps are drawn to be learned from; 0: there is nothing to draw."""
    k = options.learned_steps
    return k if options.loss == "every" and k is not None and k < steps else 0
