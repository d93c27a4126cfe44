"""Golden numbers: what tiny recipes compute, bit for bit, so that moving code about cannot move a loss unseen.

`tests/golden/losses.json` holds losses, energies and gradient norms of two optimizer steps, and of an evaluation after
them. After a change that is meant to change numbers, write it anew and say why in the commit:

    python -m tests.training.test_golden

Matrix products round differently on other processors and in other versions of torch: there the numbers are compared
to `ELSEWHERE` instead.
"""

import json
import platform
from pathlib import Path

import pytest
import torch
import typer

from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.tasks.text import Text
from ebt_megatron.training.trainer import Trainer
from tests import builders

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
ELSEWHERE = 1e-4

# Everything that a default decides is set: a new default changes no golden number.
BASE = (
    "model.kernels=torch",
    "model.conditioning=time_embed",
    "model.initialization=unit_logits",
    "thinking.min_steps=2",
    "thinking.max_steps=2",
    "thinking.step_rule=probability_descent",
    "thinking.loss=every",
    "thinking.gradient=detached",
    "thinking.step_size=5",
    "thinking.learn_step_size=true",
    "thinking.step_size_lr_multiplier=100",
    "thinking.step_size_min=1e-4",
    "thinking.step_size_scale=1",
    "thinking.langevin_noise=0",
    "thinking.initial=noise",
    "thinking.initial_std=1",
    "optimizer.warmup_steps=2",
    "optimizer.weight_decay=0.01",
    "optimizer.epsilon=1e-4",
    "training.global_batch_size=4",
    "training.seed=1234",
)
THROUGH = ("thinking.langevin_noise=0.5", "thinking.max_steps=3", "thinking.min_steps=3")
RECIPES = {
    "S1": (),
    "S1, the paper's draws": ("model.initialization=paper", "thinking.step_size=500"),
    "S2": (
        "thinking.loss=last",
        "thinking.gradient=truncated",
        "thinking.learn_step_size=false",
        "thinking.step_size_scale=2",
        "thinking.max_steps=3",
        "thinking.langevin_noise=0.5",
        "thinking.replay.enabled=true",
        "thinking.replay.capacity=2",
    ),
    "one loss of two": ("thinking.learned_steps=1",),
    "logit_descent": ("thinking.step_rule=logit_descent",),
    "mirror_descent": ("thinking.step_rule=mirror_descent", "thinking.initial_std=0"),
    "full": ("thinking.gradient=full", *THROUGH),
    "full, logit_descent": ("thinking.gradient=full", "thinking.step_rule=logit_descent", *THROUGH),
    "truncated": ("thinking.gradient=truncated", *THROUGH),
    "conditioning none": ("model.conditioning=none",),
    "conditioning time_embed_sequence": ("model.conditioning=time_embed_sequence",),
    "conditioning adaln": ("model.conditioning=adaln",),
    "conditioning adaln_zero": ("model.conditioning=adaln_zero",),
    "conditioning adaln_sequence": ("model.conditioning=adaln_sequence",),
    "quadratic energy": ("model.energy_head=quadratic", "thinking.reuse=true"),
    "reuse": ("thinking.reuse=true",),
    "regenerated": ("thinking.regenerate=7",),
    "regenerated, full": ("thinking.regenerate=7", "thinking.gradient=full", *THROUGH),
    "bf16 logits": ("thinking.logits_dtype=bfloat16",),
    "double backward": ("thinking.engine=double_backward",),
    "documents, recomputed": ("data.document_mask=true", "model.recompute_layers=true"),
    "Transformer++": ("model.architecture=baseline",),
}


def environment() -> dict[str, str]:
    """What decides how sums round."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else platform.processor(),
    }


def micro_batches(iteration: int) -> list[MicroBatch]:
    """Two micro-batches of two samples of two documents."""
    generator = torch.Generator().manual_seed(iteration)
    tokens = torch.randint(builders.VOCAB, (4, 11), generator=generator)
    documents = torch.arange(11).expand(2, 11) // torch.tensor([[4], [7]])
    ids = torch.arange(4) + 4 * iteration
    return [MicroBatch(ids[rows], tokens[rows], documents=documents) for rows in (slice(0, 2), slice(2, 4))]


def numbers(overrides: tuple[str, ...]) -> dict[str, list[float]]:
    """Train for two steps, evaluate, and tell what was computed."""
    recipe = builders.small_recipe(*BASE, *overrides)
    trainer = Trainer(recipe, Text(recipe, builders.VOCAB), builders.state(recipe))
    masked = trainer.recipe.data.document_mask
    out: dict[str, list[float]] = {}
    for iteration in range(2):
        batches = micro_batches(iteration)
        for batch in batches:
            batch.documents = batch.documents if masked else None
        result = trainer.train_step(batches, iteration)
        assert result.applied
        out[f"step {iteration}"] = [result.loss, *result.step_losses, *result.energies, result.alpha, result.grad_norm]
    objective = trainer.objective
    thought = objective.evaluate(objective.task.sample(batches[0], trainer.state.device), 3)
    out["evaluation"] = [x.double().mean().item() for tensors in (thought.losses, thought.energies) for x in tensors]
    return out


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RECIPES)
def test_golden(name):
    golden = json.loads(FILE.read_text())
    assert golden["recipes"].keys() == RECIPES.keys()
    ours, written = numbers(RECIPES[name]), golden["recipes"][name]
    if golden["environment"] == environment():
        assert ours == {key: [float.fromhex(x) for x in values] for key, values in written.items()}
    else:
        for key, values in written.items():
            assert ours[key] == pytest.approx([float.fromhex(x) for x in values], rel=ELSEWHERE, abs=ELSEWHERE)


def main() -> None:
    """Write the golden file with what this checkout computes."""
    torch.set_num_threads(1)
    recipes = {
        name: {key: [x.hex() for x in values] for key, values in numbers(overrides).items()}
        for name, overrides in RECIPES.items()
    }
    content = {"written by": "python -m tests.training.test_golden", "environment": environment(), "recipes": recipes}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
