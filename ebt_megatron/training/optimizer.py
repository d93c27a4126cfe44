"""From gradients to weights: data-parallel wrapping, AdamW, its groups, schedule and clipped step.

Everything distributed is megatron-core's (`DistributedDataParallel`, its optimizers and schedule); this
module only says how a recipe maps onto it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim.adamw import adamw

from ebt_megatron.config import Recipe


class AdamW(torch.optim.AdamW):
    """torch's AdamW with the step count in the parameter groups, as Apex's and Transformer Engine's keep it.

    megatron-core takes it in their place: its distributed optimizer cannot restore torch's own, whose step
    count is a state of every parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
    ):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # The function counts the step itself, once in each parameter's own number.
            steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(steps.unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@contextmanager
def _our_adamw() -> Iterator[None]:
    """Let megatron-core build `AdamW` where it would fall back to torch's, i.e. without Apex and TE."""
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        yield
        return
    before = megatron_optimizer.Adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER, megatron_optimizer.Adam = False, AdamW
    try:
        yield
    finally:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER, megatron_optimizer.Adam = True, before


def wrap(model_chunks: Sequence[torch.nn.Module], recipe: Recipe) -> list[DistributedDataParallel]:
    """Wrap each chunk for data parallelism, with fp32 main gradients that are summed over the ranks.

    Several `backward()` calls may add to the gradients of one step; nothing is communicated before
    `apply_gradients`. All data-parallel ranks leave with rank 0's weights.

    Args:
        model_chunks: megatron modules, whose config has `calculate_per_token_loss=True`.
        recipe: says whether the optimizer is distributed.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        # Overlapping counts one backward a parameter and micro-batch; learning does one for every step.
        overlap_grad_reduce=False,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
    )
    wrapped = []
    for chunk in model_chunks:
        per_token = chunk.config.calculate_per_token_loss  # type: ignore[union-attr]
        assert per_token, "gradients must be summed over data-parallel ranks"
        ddp = DistributedDataParallel(chunk.config, ddp_config, chunk)
        ddp.broadcast_params()
        wrapped.append(ddp)
    return wrapped


def build_optimizer(
    model_chunks: Sequence[DistributedDataParallel], recipe: Recipe, lr_multipliers: Mapping[str, float]
) -> MegatronOptimizer:
    """AdamW with its parameter groups, sharded over data-parallel ranks if the recipe says so.

    Parameters of at most one dimension have no weight decay, unless `optimizer.weight_decay_on=all`; those with a
    learning rate of their own never have.

    Args:
        model_chunks: from `wrap`.
        recipe: `optimizer.*`, `training.precision` and `parallel.distributed_optimizer`.
        lr_multipliers: of parameters that learn at so many times the learning rate, by name in the model.
    """
    options = recipe.optimizer
    assert options.lr is not None
    bf16 = recipe.training.precision != "fp32"
    no_decay = ParamPredicate("no weight decay", lambda p: p.ndim <= 1)
    overrides: dict[ParamKey, dict[str, float]] = {}
    if options.weight_decay_on == "matrices":
        overrides[ParamKey(predicate=no_decay)] = {"wd_mult": 0.0}
    for name, multiplier in lr_multipliers.items():
        lr = options.lr * multiplier
        named = ParamKey(name=f"module.{name}")  # in the wrapper
        least = (lr if recipe.thinking.step_size_lr_floor == "own" else options.lr) * options.min_lr_ratio
        overrides[named] = {"max_lr": lr, "min_lr": least, "lr_mult": multiplier, "wd_mult": 0.0}
    with _our_adamw():
        return megatron_optimizer.get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                min_lr=options.lr * options.min_lr_ratio,
                weight_decay=options.weight_decay,
                adam_beta1=options.beta1,
                adam_beta2=options.beta2,
                adam_eps=options.epsilon,
                clip_grad=options.clip_grad,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=recipe.parallel.distributed_optimizer,
            ),
            list(model_chunks),
            config_overrides=overrides,
            use_gloo_process_groups=False,
        )


def build_scheduler(optimizer: MegatronOptimizer, recipe: Recipe) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then a cosine to `min_lr_ratio` of the peak; constant afterwards.

    A warm-up that is longer than the run is a ramp that never reaches its peak.
    """
    options = recipe.optimizer
    assert options.lr is not None and options.decay_steps is not None
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.lr * options.min_lr_ratio,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=max(options.decay_steps, options.warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def schedule_change(recipe: Recipe, before: dict[str, Any], step: int) -> str | None:
    """One line on what becomes of the learning rate where a run goes on with another schedule than it had; or None.

    Args:
        recipe: of the run that goes on.
        before: `schedule_of` the run before.
        step: where it goes on.
    """
    now = schedule_of(recipe)
    changed = [key for key in now if before.get(key, now[key]) != now[key]]
    if not changed:
        return None
    earlier = copy.deepcopy(recipe)
    for key in changed:
        setattr(earlier.optimizer, key, before[key])
    rates = []
    nothing: Any = SimpleNamespace(param_groups=[])  # that a schedule could change
    for schedule in (build_scheduler(nothing, earlier), build_scheduler(nothing, recipe)):
        schedule.num_steps = step
        rates.append(schedule.get_lr({}))
    what = ", ".join(f"optimizer.{key} {before[key]:g} -> {now[key]:g}" for key in changed)
    keep = " ".join(f"optimizer.{key}={before[key]:g}" for key in changed)
    return (
        f"another learning-rate schedule than before ({what}): at step {step} it goes from {rates[0]:.3g} to "
        f"{rates[1]:.3g}; {keep} keeps it as it was"
    )


def schedule_of(recipe: Recipe) -> dict[str, Any]:
    """What fixes the learning rate of every step."""
    options = recipe.optimizer
    return {key: getattr(options, key) for key in ("lr", "min_lr_ratio", "warmup_steps", "decay_steps")}


def _scale_down(gradients: list[torch.Tensor], factor: float) -> None:
    """Multiply gradients, of any precision, where the factor is below 1; a rank of few weights may hold none."""
    if factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)


def zero_gradients(model_chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Forget all gradients; call before the first backward of a step."""
    for chunk in model_chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


@dataclass(frozen=True)
class Update:
    """What a step did: the global gradient norm before clipping, the learning rate, whether it counted."""

    grad_norm: float
    lr: float
    applied: bool


def apply_gradients(
    model_chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    skip: bool = False,
) -> Update:
    """Reduce the gradients over the ranks, clip them to `optimizer.config.clip_grad` and update the weights.

    Weights and optimizer state stay as they are when the gradient norm is not finite (all ranks see the
    same norm, so all decide alike) or `skip` is set. The schedule moves on in either case, so that the
    learning rate is a function of the step number.

    Args:
        model_chunks: from `wrap`.
        optimizer: from `build_optimizer`.
        scheduler: from `build_scheduler`.
        skip: the ranks agreed that this step is bad (see `faults.agree`).
    """
    scheduler.step(1)
    finalize_model_grads(list(model_chunks))
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    applied = math.isfinite(grad_norm) and not skip
    if applied:
        clip = optimizer.config.clip_grad
        if clip > 0.0:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            _scale_down([p.grad for p in parameters if p.grad is not None], clip / (grad_norm + 1e-6))
        optimizer.step_with_ready_grads()
    lr = next(g["lr"] for g in optimizer.param_groups if g["default_config"])
    return Update(grad_norm, lr, applied)
