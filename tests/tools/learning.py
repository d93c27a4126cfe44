"""Ten optimizer steps of a public code's model and of its import, beside each other."""

import math

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

from ebt_megatron.tools.import_ebt_checkpoint import convert_weights
from ebt_megatron.training import optimizer
from tests.builders import relative_error

LEARNING = {
    "max_steps": 100,
    "max_scheduling_steps": 12,
    "min_lr_scale": 5,
    "warm_up_steps": 3,
    "peak_learning_rate": 0.01,
    "mcmc_step_size_lr_multiplier": 20.0,
    "weight_decay": 0.1,
}


@pytest.fixture
def float64(monkeypatch):
    """Where megatron-core takes float32 whatever the model's precision is, it takes float64: sums and cross-entropy."""
    config = optimizer.DistributedDataParallelConfig
    monkeypatch.setattr(
        optimizer, "DistributedDataParallelConfig", lambda **kw: config(**{**kw, "grad_reduce_in_fp32": False})
    )
    top = staticmethod(lambda logits: (logits.clone(), logits.amax(-1)))
    monkeypatch.setattr(VocabParallelCrossEntropy, "calculate_logits_max", top)


def _norm(ours):
    """The gradient's, in its own precision; megatron-core's is of float32."""
    gradients = (p.grad for group in ours.param_groups for p in group["params"])
    return torch.nn.utils.get_total_norm([g for g in gradients if g is not None])


def learn_both(original, model, recipe, losses_of, losses_here, tolerance=1e-7, constant=()):
    """Optimizer steps on both sides, in float64; theirs: torch's AdamW with the public code's groups and rates.

    Args:
        original, model, recipe: theirs, and its import.
        losses_of, losses_here: a step's loss of theirs, and of ours, which leaves its gradients.
        tolerance: relative, of losses and weights.
        constant: endings of names of weights that stay as they were, on our side alone.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    named = dict(original.named_parameters())
    alpha = [p for name, p in named.items() if name == "model.alpha"]
    others = [p for name, p in named.items() if p.requires_grad and name != "model.alpha"]
    peak, least = 0.01, 0.01 / 5
    groups = [{"params": others, "weight_decay": 0.1, "lr": peak}]
    if alpha:
        groups.append({"params": alpha, "weight_decay": 0.0, "lr": 20 * peak})
    theirs = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in theirs.param_groups]
    multipliers = {"step_size": recipe.thinking.step_size_lr_multiplier} if alpha else {}
    chunks = optimizer.wrap([model], recipe)
    ours = optimizer.build_optimizer(chunks, recipe, multipliers)
    ours.get_grad_norm = lambda: _norm(ours)
    scheduler, norms, clip = optimizer.build_scheduler(ours, recipe), [], recipe.optimizer.clip_grad
    for step in range(1, 11):
        for group, high in zip(theirs.param_groups, peaks, strict=True):
            cosine = (1 + math.cos(math.pi * (step - 3) / (12 - 3))) / 2
            group["lr"] = high * step / 3 if step <= 3 else least + (high - least) * cosine
        theirs.zero_grad()
        wanted = losses_of()
        wanted.backward()
        norms.append(torch.nn.utils.clip_grad_norm_([*others, *alpha], clip))
        theirs.step()
        optimizer.zero_gradients(chunks, ours)
        found = losses_here()
        optimizer.apply_gradients(chunks, ours, scheduler)
        assert abs(float(found) - float(wanted)) < tolerance * abs(float(wanted)), step
    assert min(norms) < clip < max(norms), f"some of the gradients are clipped: {min(norms):.3f} to {max(norms):.3f}"
    expected = convert_weights({k: p.detach() for k, p in named.items() if p.grad is not None}, recipe)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(constant)):
            assert torch.equal(parameter, before[name]), name
            continue
        assert relative_error(parameter.detach(), expected[name]) < tolerance, name
        assert (parameter - before[name]).abs().max() > 1e-3, f"{name} learns"
