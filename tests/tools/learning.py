"""Ten optimizer steps of a public code's model and of its import, beside each other."""

import math

import pytest
import torch

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
    "gradient_clip_val": 0,  # Megatron's clipping is of float32
}


def learn_both(original, model, recipe, losses_of, losses_here, tolerance=1e-7):
    """Optimizer steps on both sides, in float64; theirs: torch's AdamW with the public code's groups and rates."""
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
    with pytest.MonkeyPatch.context() as patch:  # gradients in float64
        config = optimizer.DistributedDataParallelConfig
        patch.setattr(
            optimizer,
            "DistributedDataParallelConfig",
            lambda **kw: config(**{**kw, "grad_reduce_in_fp32": False}),
        )
        chunks = optimizer.wrap([model], recipe)
        ours = optimizer.build_optimizer(chunks, recipe, multipliers)
    scheduler = optimizer.build_scheduler(ours, recipe)
    for step in range(1, 11):
        for group, high in zip(theirs.param_groups, peaks, strict=True):
            cosine = (1 + math.cos(math.pi * (step - 3) / (12 - 3))) / 2
            group["lr"] = high * step / 3 if step <= 3 else least + (high - least) * cosine
        theirs.zero_grad()
        wanted = losses_of()
        wanted.backward()
        theirs.step()
        optimizer.zero_gradients(chunks, ours)
        found = losses_here()
        optimizer.apply_gradients(chunks, ours, scheduler)
        assert abs(float(found) - float(wanted)) < tolerance * abs(float(wanted)), step
    expected = convert_weights({k: p.detach() for k, p in named.items() if p.grad is not None}, recipe)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.detach(), expected[name]) < tolerance, name
        assert (parameter - before[name]).abs().max() > 1e-3, f"{name} learns"
