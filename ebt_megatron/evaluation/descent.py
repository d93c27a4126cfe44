"""Whether thinking descends: what each step does to the energy that it is a step on.

With E(t) the energy at x + t (x' - x), t from 0 to 1, between what the model read of a prediction before a step, x, and
what it reads after it, x', in the same landscape, and E(t) about E(0) + s t + c t^2 / 2:

    energy drop   E(0) - E(1)
    raised        E(1) > E(0)
    curvature     -c / s, which is alpha d^T H d / d^T d for a step -alpha d along the gradient d: below 1 a step falls
                  short of the least energy along it, at 1 it is there, and above 2 it raises the energy

s and c follow from E(0), E(1/2) and E(1). This curvature is along the step, so it is at most alpha times the largest
eigenvalue of the Hessian H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebt_megatron.objectives.energy import EnergyObjective
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.thinking.plan import Plan


@torch.no_grad()
def descent(objective: EnergyObjective, sample: Sample, steps: int) -> list[dict[str, Any]]:
    """Energy drop, share of raised energies and curvature of each step; on one process.

    Args:
        objective: of the run.
        sample: a micro-batch.
        steps: to take.

    Returns:
        For each step "energy_drop", a mean; "raised", a share, of positions or of samples whose positions see each
        other; "curvature", from sums over all of them, None where they do not fall at first.
    """
    thinker, out = objective.thinker(sample), []
    model, prediction = thinker.model, thinker.descent.prediction

    def energy(step: int, x: Tensor) -> Tensor:
        found = thinker.propose_forward(step, x).detach().double()
        return found if model.separable else found.sum(0, keepdim=True)

    for kind, step in Plan.thinking(steps, model.starts_thinking).sweeps(model.context_sees_step):
        if kind == "propose_forward":
            before = thinker.descent.propose_input(step)
            thinker.propose_forward(step, before)
        elif kind == "propose_backward":
            thinker.propose_backward(step)
            after = prediction.embed()
            e0, half, e1 = (energy(step, x) for x in (before, (before + after) / 2, after))
            slope, curve = (4 * half - 3 * e0 - e1).sum().item(), (4 * (e0 - 2 * half + e1)).sum().item()
            out.append(
                {
                    "energy_drop": (e0 - e1).mean().item(),
                    "raised": (e1 > e0).double().mean().item(),
                    "curvature": -curve / slope if slope < 0 else None,
                }
            )
        else:
            getattr(thinker, kind)(step)
    return out
