"""The optimizer step: the same on every layout, with groups, schedule, clipping and skipped steps."""

import math

import pytest
import torch

from tests.distributed_utils import run_ranks
from tests.training.toy import Run, toy_recipe

STEPS = 10


def _train(layouts: list[tuple[str, ...]], steps: int):
    """Per layout the losses and norms, and the learned scalar, of one run after another."""
    from ebt_megatron.parallel import setup

    answers = []
    for overrides in layouts:
        setup.shutdown()
        run = Run(toy_recipe(*overrides))
        history = run.train(steps)
        answers.append(([(loss, u.grad_norm, u.lr) for loss, u in history], run.model.scale.item()))
    return answers


DISTRIBUTED = "parallel.distributed_optimizer=true"
LAYOUTS = {
    1: [(), (DISTRIBUTED,)],
    2: [
        ("parallel.tensor=2",),
        ("parallel.tensor=2", "parallel.sequence_parallel=true"),
        (DISTRIBUTED,),
        (),
    ],
    4: [("parallel.tensor=2",), ("parallel.tensor=2", "parallel.sequence_parallel=true", DISTRIBUTED)],
}


def test_training_does_not_depend_on_the_layout():
    reference = None
    for ranks, layouts in LAYOUTS.items():
        for answers in run_ranks(_train, ranks, layouts, STEPS):
            for layout, (history, scale) in zip(layouts, answers, strict=True):
                reference = reference or (history, scale)
                for step, (ours, expected) in enumerate(zip(history, reference[0], strict=True)):
                    assert ours == pytest.approx(expected, rel=2e-6), (ranks, layout, step)
                assert scale == pytest.approx(reference[1], rel=1e-5), (ranks, layout)
    losses = [loss for loss, _, _ in reference[0]]
    assert losses[-1] < 0.9 * losses[0], "the toy must learn, or equality shows nothing"


def _details():
    """Facts of one process: groups, schedule, AdamW against torch's, clipping, skipped steps."""
    recipe = toy_recipe()
    run = Run(recipe)
    groups = {}
    names = {id(p): n for n, p in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            groups[names[id(p)]] = (group["weight_decay"], group["max_lr"])

    before = [p.detach().clone() for p in run.model.parameters()]
    (_, skipped), (_, bad) = run.train(2, skip_at=0, nan_at=1)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    no_state = not any(run.optimizer.chained_optimizers[0].optimizer.state.values())
    (_, update), *_ = run.train(1)
    norm = math.sqrt(sum(p.main_grad.square().sum().item() for p in run.model.parameters()))
    return groups, (skipped, bad, update), unchanged and no_state, norm


def test_groups_skipped_steps_and_clipping():
    ((groups, (skipped, bad, update), untouched, clipped_norm),) = run_ranks(_details, 1)
    assert groups["embedding.weight"] == groups["layers.0.up.weight"] == (0.1, 1e-2)
    assert groups["layers.1.norm"] == (0.0, 1e-2)
    assert groups["scale"] == (0.0, pytest.approx(1e-1))
    assert not skipped.applied and math.isfinite(skipped.grad_norm)
    assert not bad.applied and math.isnan(bad.grad_norm)
    assert untouched, "a skipped step must leave weights and optimizer state alone"
    assert update.applied and update.grad_norm > 0.5
    assert clipped_norm == pytest.approx(0.5, rel=1e-4)
    # Warm-up 2 of 10 steps: the schedule follows the step number, skipped steps included.
    cosine = 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * (3 - 2) / (10 - 2)))
    assert [skipped.lr, bad.lr, update.lr] == pytest.approx([5e-3, 1e-2, cosine])


def test_adamw_equals_torchs():
    from ebt_megatron.training.optimizer import AdamW

    def trained(cls):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(()))]
        optimizer = cls(weights, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (weights[0].sin().sum() * weights[1]).backward()
            optimizer.step()
        return weights

    for ours, theirs in zip(trained(AdamW), trained(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
