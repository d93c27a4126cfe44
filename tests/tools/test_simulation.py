"""A simulated step holds, computes and sends what a real one does, of every modality."""

from collections import Counter

import pytest
from typer.testing import CliRunner

from ebt_megatron.objectives.flops import sample_flops
from ebt_megatron.tasks import task_class
from ebt_megatron.tools.ledger import PARTS, Account, Traffic
from ebt_megatron.tools.simulation import Simulated
from tests import builders
from tests.cases import slow
from tests.distributed_utils import run_ranks

REUSE, REGENERATE = "thinking.reuse=true", "thinking.regenerate=30"
RECOMPUTE, BF16 = "model.recompute_layers=true", "training.precision=bf16"
TENSOR = ("parallel.tensor=2", "parallel.sequence_parallel=true")
PIPELINE, SHARDED = "parallel.pipeline=2", "parallel.distributed_optimizer=true"
CONTEXT = ("thinking.initial=context", "thinking.step_rule=mirror_descent")
LAYOUTS = {  # number of ranks: what is run on them
    2: {
        "TP 2 + SP, reuse": (*TENSOR, REUSE),
        "PP 2, regenerated": (PIPELINE, REGENERATE),
        "DP 2, distributed optimizer, recomputed": (SHARDED, RECOMPUTE),
    },
    "2 more": {
        "TP 2, bf16": ("parallel.tensor=2", BF16),
        "PP 2, reuse, recomputed, bf16": (PIPELINE, REUSE, RECOMPUTE, BF16),
        "PP 2, from the context": (PIPELINE, *CONTEXT),
        "DP 2, through steps": ("thinking.gradient=full",),
        "DP 2, noise": ("thinking.langevin_noise=0.5", "thinking.initial_std=1"),
        "PP 2, Transformer++": (PIPELINE, "model.architecture=baseline"),
    },
    4: {
        "TP 2 + SP x PP 2, reuse": (*TENSOR, PIPELINE, REUSE),
        "PP 2 x DP 2, distributed optimizer": (PIPELINE, SHARDED),
        "TP 2 x DP 2, distributed optimizer, bf16": ("parallel.tensor=2", SHARDED, BF16),
        "PP 4, two in flight": ("parallel.pipeline=4", "parallel.micro_batches_in_flight=2"),
    },
}
VOCAB, CHANNELS = 500, 12
JOINT = ("model.conditioning=none", "model.num_query_groups=4")
MODALITIES = {
    "video": ("data.modality=video", "video.tokens_per_side=2"),
    "pictures, denoised": ("data.modality=images", "thinking.initial=observed", *JOINT),
    "pictures of captions": ("data.modality=images", "images.captions=true", *JOINT),
    "puzzles": ("data.modality=puzzles", "data.sequence_length=36", *JOINT),
}
LAYOUTS["modalities"] = {
    "video, PP 2, reuse": (*MODALITIES["video"], PIPELINE, REUSE),
    "pictures, denoised, TP 2 + SP": (*MODALITIES["pictures, denoised"], *TENSOR),
    "pictures of captions, PP 2, recomputed": (*MODALITIES["pictures of captions"], PIPELINE, RECOMPUTE),
    "pictures of classes, DP 2, sharded": (*MODALITIES["pictures, denoised"], "images.classes=true", SHARDED),
    "puzzles, TP 2, bf16": (*MODALITIES["puzzles"], "parallel.tensor=2", BF16),
    "DiT, DP 2": (*MODALITIES["pictures, denoised"], "model.architecture=baseline"),
}


def recipe_of(overrides, layers):
    return builders.small_recipe(
        f"model.num_layers={layers}",
        "model.hidden_size=64",
        "thinking.max_steps=2",
        "thinking.min_steps=2",
        "data.sequence_length=48",
        "training.global_batch_size=4",
        "training.micro_batch_size=1",
        "model.kernels=torch",
        *overrides,
    )


def task_of(recipe):
    return task_class(recipe.data.modality).of_size(recipe, VOCAB, CHANNELS)


def both(layouts, size):
    """Accounts of this rank's step by layout: of real tensors among the other ranks, and of fake ones alone."""
    from ebt_megatron.parallel.setup import shutdown
    from ebt_megatron.tools.ledger import Ledger
    from ebt_megatron.tools.simulation import account_of_step, made_up_batches, simulate_rank

    accounts = {}
    for name, overrides in layouts.items():
        recipe = recipe_of(overrides, layers=max(2, size))
        state, task = builders.state(recipe), task_of(recipe)
        batches = made_up_batches(recipe, task, state.data_size)
        real = account_of_step(Ledger, recipe, task, state, batches)
        shutdown()
        accounts[name] = real, simulate_rank(recipe, task, state.rank, size, at_once=False)
    return accounts


@pytest.mark.parametrize("layouts", [2, slow("2 more"), slow("modalities"), slow(4)])
def test_a_simulated_step_is_the_real_one(layouts):
    size = layouts if isinstance(layouts, int) else 2
    for rank, accounts in enumerate(run_ranks(both, size, LAYOUTS[layouts], size)):
        for name, (real, fake) in accounts.items():
            where = f"{name}, rank {rank}: {fake} for {real}"
            assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05), where
            assert fake.flops == real.flops, where
            assert moved(fake) == pytest.approx(moved(real), rel=0.05), where
            assert fake.messages == real.messages, where
            assert fake.collectives == real.collectives, where


def moved(account):
    """Bytes that operations of thinking read and write."""
    passes = ("context", "propose", "learn")
    return sum(times * size for (phase, _, size), times in account.work.items() if phase in passes)


def account(*overrides, size=1, rank=0, **options):
    from ebt_megatron.tools.simulation import simulate_rank

    recipe = recipe_of(overrides, layers=2)
    return simulate_rank(recipe, task_of(recipe), rank, size, **options)


def accounts_by_modality():
    return [account(*overrides) for overrides in MODALITIES.values()]


def test_every_modality_is_simulated_and_takes_about_what_its_formula_says():
    (accounts,) = run_ranks(accounts_by_modality, 1)
    for overrides, found in zip(MODALITIES.values(), accounts, strict=True):
        recipe = recipe_of(overrides, layers=2)
        step = recipe.training.global_batch_size * sample_flops(recipe, task_of(recipe).cost())
        assert 0.95 < found.flops.total() / step < 1.5, recipe.data.modality  # its tangents' attention takes more
        assert {"context", "propose", "learn"} <= set(found.phase_peaks)


def accounts_by_kernels():
    whole, short = (account("model.kernels=triton", TENSOR[0], size=4, shortcut=s) for s in (False, True))
    return whole, short, account("model.kernels=torch", TENSOR[0], size=4)


def test_neither_the_shortcut_nor_kernels_change_what_is_sent():
    """And the shortcut changes nothing at all."""
    ((whole, short, tiled),) = run_ranks(accounts_by_kernels, 1)
    assert short.flops == whole.flops
    assert short.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-4)
    assert short.collectives == whole.collectives == tiled.collectives


def attention(kernels, operation, tangent, fake):
    """Attention in which every position sees every other, and its gradient: shapes and types, and FLOPs forward."""
    import torch

    from ebt_megatron.tools.ledger import Ledger
    from ebt_megatron.tools.simulation import FakeLedger

    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)

    streams = 4 if tangent else 2
    with (FakeLedger if fake else Ledger)(str) as ledger:
        if operation == "full":
            given = [drawn(6, streams, 3 * 2 * 16)]
            out = kernels.full_attention(*given, torch.zeros(96, dtype=torch.bfloat16), 16, tangent=tangent)
        else:
            given = [drawn(6, s, 2, 16) for s in (streams, streams, streams, 2, 2)]
            out = kernels.prediction_attention(*given, tangent=tangent, block=6)
        forward = ledger.account.flops.total()
        grads = torch.autograd.grad(out.sum(), given)
        assert ledger.account.flops.total() > 2 * forward
    return [(t.shape, t.dtype) for t in (out, *grads)], forward


@pytest.mark.parametrize("operation", ["full", "prediction"])
@pytest.mark.parametrize("tangent", [False, True])
def test_triton_kernels_that_are_not_launched_give_what_others_do(tangent, operation):
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ebt_megatron.kernels import select
    from ebt_megatron.tools.simulation import no_launches

    with no_launches(), FakeTensorMode():
        faked = attention(select("triton"), operation, tangent, True)
    assert faked == attention(select("torch"), operation, tangent, False)


def test_memory_that_is_let_go_is_not_held():
    import torch

    from ebt_megatron.tools.ledger import Ledger

    with Ledger(str) as ledger:
        kept = torch.zeros(100)
        for _ in range(3):
            torch.zeros(1000).view(10, 100).sum()
    assert 4400 <= ledger.account.peak_bytes < 5000
    assert sum(ledger._held.values()) == kept.nbytes


def formula_and_simulation():
    """(estimated, simulated) bytes of weights and what belongs to them, and of everything else."""
    from ebt_megatron.tools.hardware import Hardware
    from ebt_megatron.tools.plan import estimate, memory_of

    pairs = []
    for overrides in ((BF16,), (BF16, SHARDED, REUSE), (BF16, RECOMPUTE)):
        wide = ("model.hidden_size=256", "model.kernels=triton", "thinking.min_steps=2", *overrides)
        recipe = recipe_of(wide, layers=2)
        planned = estimate(recipe, task_of(recipe), 4, Hardware(1, 1, 1))
        found = memory_of(account(*wide, size=4))
        pairs.append(((planned.weight_bytes, planned.activation_bytes), found))
    return pairs


def test_the_formula_is_near_what_is_simulated():
    (pairs,) = run_ranks(formula_and_simulation, 1)
    for (states, activations), (states_found, activations_found) in pairs:
        assert states == pytest.approx(states_found, rel=0.02)
        assert 0.5 < activations / activations_found < 2


def shown(arguments, monkeypatch=None):
    from ebt_megatron.tools import plan, simulation

    if monkeypatch is not None:
        held = Account(dict.fromkeys(PARTS, 10**9), {"learn": 8 * 10**9}, Counter(learn=10**12))
        held.messages["send", 2] = Traffic(3, 10**6)
        monkeypatch.setattr(simulation, "simulate", lambda recipe, task, size, ranks: [Simulated(held, 1, 1, 1)] * 2)
    return CliRunner().invoke(plan.app, arguments)


class Bare:
    """A modality of one's own that makes nothing up."""

    @classmethod
    def of_size(cls, recipe, vocab_size, channels):
        return cls()


PLAN = ["text/s1_xxs", "parallel.pipeline=2", "--gpus", "4", "--simulate"]


def test_a_layout_that_does_not_fit_is_refused_with_what_to_change(monkeypatch):
    fits = shown([*PLAN, "--memory", "80"], monkeypatch)
    assert fits.exit_code == 0 and "fits: 8.0 GB of 80 GB" in fits.output
    assert all(word in fits.output for word in (*PARTS, "stage 1 of 2", "stage 2 of 2", "send to rank 2"))
    refused = shown([*PLAN, "--memory", "4"], monkeypatch)
    assert refused.exit_code == 2
    assert "does not fit: 8.0 GB of 4 GB" in refused.output and "training.micro_batch_size" in refused.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "4"], "there are ranks 0 to 3"),
        (["data.modality=tests.tools.test_simulation:Bare"], "give its task `made_up`"),
    ],
)
def test_what_cannot_be_simulated_is_said(arguments, says):
    refused = shown([*PLAN, *arguments])
    assert refused.exit_code == 2 and says in refused.output


@pytest.mark.slow
def test_two_thousand_ranks_are_simulated_by_a_command():
    done = shown([*PLAN, "--gpus", "2048", "training.global_batch_size=16384", "--rank", "0", "--rank", "2047"])
    assert done.exit_code == 0 and "rank 2047" in done.output
