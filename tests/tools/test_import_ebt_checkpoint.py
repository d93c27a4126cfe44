"""Imported weights of text give the energies of the model they were trained in, `Original`: see `originals.py`."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from ebt_megatron.checkpoint.weights import read_weights, set_weights
from ebt_megatron.config import RecipeError, load_recipe, to_yaml
from ebt_megatron.data.folder import ShardFolder
from ebt_megatron.parallel.setup import initialize
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.text import Text
from ebt_megatron.thinking.dual_stream import Descent, Thinker, step_sizes
from ebt_megatron.thinking.plan import Plan
from ebt_megatron.tools.import_ebt_checkpoint import app, convert, convert_weights
from ebt_megatron.tools.public_code.source import read_checkpoint
from tests.builders import position_weight, relative_error, text_batch, text_shards
from tests.tools.learning import LEARNING, float64, learn_both  # noqa: F401
from tests.tools.originals import (
    HEADS,
    HYPER,
    KINDS,
    LAYERS,
    PRECISIONS,
    STEPS,
    TOLERANCE,
    VOCAB,
    WIDTH,
    Block,
    Norm,
    Trunk,
    close,
    linear,
    randomize,
    save,
)


class Inner(nn.Module):
    def __init__(self, kind, vocab, epsilon):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(4.0))
        self.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.embeddings, self.vocab_to_embed = nn.Embedding(vocab, WIDTH), linear(vocab, WIDTH)
        self.transformer = Trunk(kind, epsilon)


class Baseline(nn.Module):
    """The public code's Transformer++, as Lightning saves it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Module()
        self.model.embeddings, self.model.output = nn.Embedding(VOCAB, WIDTH), linear(WIDTH, VOCAB)
        trunk = self.model.transformer = nn.Module()
        trunk.layers, trunk.norm = nn.ModuleList(Block(1e-5) for _ in range(LAYERS)), Norm(1e-5)
        randomize(self)

    def forward(self, tokens, targets):
        """Cross-entropy [B, S]."""
        length, trunk = tokens.shape[1], self.model.transformer
        x, mask = self.model.embeddings(tokens), torch.ones(length, length).tril().bool()
        for layer in trunk.layers:
            x = layer(x, torch.arange(length).double(), mask)
        logits = self.model.output(trunk.norm(x))
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


class Original(nn.Module):
    """What Lightning saves: the model under `model.`."""

    def __init__(self, kind="default", vocab=VOCAB, epsilon=1e-5):
        super().__init__()
        torch.manual_seed(1)
        self.model = Inner(kind, vocab, epsilon)
        randomize(self)

    def think(self, tokens, targets, y, from_probabilities, steps=STEPS):
        """Yield (y before the step, energies [B, S], y after it, losses [B, S]), detached between the steps.

        Args:
            from_probabilities: as the public code steps, y' = p - alpha dE/dp; else y' = y - alpha dE/dy.
        """
        model = self.model
        for step in range(steps):
            before = y = y.detach().requires_grad_()
            p = y.softmax(-1)
            energies = model.transformer(model.embeddings(tokens), model.vocab_to_embed(p), min(step, STEPS - 1))
            start = p if from_probabilities else y
            (gradient,) = torch.autograd.grad(energies.sum(), start, create_graph=True)
            y = start - model.alpha.clamp(min=1e-4) * gradient
            losses = F.cross_entropy(y.transpose(1, 2), targets, reduction="none")
            yield before.detach(), energies, y, losses


def imported(original, folder, kind, dtype, **hyper):
    """The original's weights in our model, through a .ckpt file."""
    checkpoint = save(original, folder / "last.ckpt", {**HYPER, "ebt_type": kind, **hyper})
    convert(checkpoint, folder / "weights.safetensors")
    recipe = load_recipe(folder / "weights.yaml", ["model.kernels=reference"])
    initialize(recipe.parallel, 0)
    model = build_model(recipe, Text(recipe, VOCAB, end_of_text=0)).to(dtype)
    set_weights(folder / "weights.safetensors", model, read_weights(folder / "weights.safetensors")[0])
    return model, recipe


def thinker(model, recipe, batch, logits, plan=None):
    """Our side, starting from logits [B, S, V]."""
    start = F.pad(logits.transpose(0, 1), (0, model.modality.prediction_embedding.weight.shape[0] - VOCAB))
    prediction = model.modality.prediction(batch.targets, batch.sample_ids, recipe.thinking, 0, start)
    sizes = step_sizes(model.step_size, recipe.thinking, batch.sample_ids, batch.targets.shape[1], 0, random=False)
    weight = None if plan is None else position_weight(batch, model.head.dtype)
    descent = Descent(prediction, model.step_size, *sizes, plan, weight, separable=model.separable)
    embed = lambda: model.modality.context(batch.observed)  # noqa: E731
    learned = plan.learned if plan else ()
    return Thinker(model, len(batch.sample_ids), batch.targets.shape[1], None, learned, embed, descent)


def noise(batch, dtype):
    return torch.randn(*batch.targets.shape, VOCAB, generator=torch.Generator().manual_seed(5)).to(dtype)


@KINDS
@PRECISIONS
def test_energies_and_steps_of_the_public_code(kind, dtype, tmp_path):
    """At each prediction the original passes through: its energy, and from our gradient its step and loss."""
    original, batch = Original(kind).to(dtype), text_batch()
    model, recipe = imported(original, tmp_path, kind, dtype)
    steps = list(original.think(batch.observed, batch.targets, noise(batch, dtype), from_probabilities=True))
    for i, (before, energies, after, losses) in enumerate(steps):
        ours = thinker(model, recipe, batch, before)
        ours.context_forward(i)
        x = ours.descent.propose_input(0).detach().requires_grad_()
        energy = model.predict(x, ours.key_values(constant=True), ours.length, None, i, tangent=False)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        close(energy.t(), energies, dtype)
        table = model.modality.prediction_embedding.weight[:VOCAB]
        moved = before.softmax(-1) - model.step_size * (gradient @ table.t()).transpose(0, 1)
        close(moved, after, dtype)
        close(F.cross_entropy(moved.transpose(1, 2), batch.targets, reduction="none"), losses, dtype)
    assert (steps[0][2] - steps[0][0]).abs().max() > 0.1, "the prediction moves"


@KINDS
@PRECISIONS
@pytest.mark.parametrize("step_rule", ["probability_descent", "logit_descent"])
def test_thinking_and_training_of_the_public_code(step_rule, kind, dtype, tmp_path):
    """Energies and losses of every step, and the gradient of every weight."""
    original, batch = Original(kind).to(dtype), text_batch()
    model, recipe = imported(original, tmp_path, kind, dtype)
    assert recipe.thinking.step_rule == "probability_descent"
    recipe.thinking.step_rule = step_rule
    weight = position_weight(batch, dtype)
    steps = list(original.think(batch.observed, batch.targets, noise(batch, dtype), step_rule == "probability_descent"))
    sum((weight.t() * losses).sum() / STEPS for *_, losses in steps).backward()

    plan = Plan.of(recipe.thinking, STEPS)
    thought = thinker(model, recipe, batch, noise(batch, dtype), plan).train()
    for i, (_, energies, _, losses) in enumerate(steps):
        close(thought.energies[i].t(), energies.detach(), dtype)
        close(thought.losses[i].t(), losses.detach(), dtype)
    gradients = {k: p.grad for k, p in original.named_parameters() if p.grad is not None}
    expected = convert_weights(gradients, recipe)
    for name, parameter in model.named_parameters():
        error = relative_error(parameter.grad, expected[name])
        assert error < 20 * TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize(("kind", "repeats"), [("default", 0), ("time_embed", 2), ("adaln", 1), ("adaln_zero", 0)])
def test_training_goes_on_as_there(kind, repeats, tmp_path, float64):  # noqa: F811
    """Ten steps with the optimizer; the last landscape may come several times, and stays one."""
    original, batch, dtype, most = Original(kind).double(), text_batch(), torch.float64, STEPS + repeats
    random = {"randomize_mcmc_num_steps": repeats, "randomize_mcmc_num_steps_final_landscape": True}
    model, recipe = imported(original, tmp_path, kind, dtype, **random, **LEARNING, gradient_clip_val=8.0)
    assert (recipe.thinking.max_steps, recipe.thinking.landscapes) == (most, STEPS if repeats else None)
    weight, start = position_weight(batch, dtype), noise(batch, dtype)

    def theirs():
        steps = original.think(batch.observed, batch.targets, start, True, most)
        return sum((weight.t() * losses).sum() / most for *_, losses in steps)

    def ours():
        thought = thinker(model, recipe, batch, start, Plan.of(recipe.thinking, most)).train()
        return sum((weight * losses).sum() / most for losses in thought.losses)

    learn_both(original, model, recipe, theirs, ours)


def test_training_of_the_baseline_goes_on_as_there(tmp_path, float64):  # noqa: F811
    original, batch, hyper = Baseline().double(), text_batch(), {"model_name": "baseline_transformer", **LEARNING}
    model, recipe = imported(original, tmp_path, None, torch.float64, **hyper, gradient_clip_val=1.2)
    weight = position_weight(batch, torch.float64)

    def ours():
        loss = (weight * model(batch.observed, batch.targets)).sum()
        loss.backward()
        return loss

    theirs = lambda: (weight.t() * original(batch.observed, batch.targets)).sum()  # noqa: E731
    learn_both(original, model, recipe, theirs, ours)


def test_settings_become_a_recipe(tmp_path):
    hyper = {
        **HYPER,
        "norm_eps": 1e-3,
        "ebt_type": "time_embed",
        "truncate_mcmc": True,
        "mcmc_replay_buffer": True,
        "langevin_dynamics_noise": 3.0,
        "randomize_mcmc_step_size_scale": 2.0,
        "max_steps": 77,
    }
    original = Original("time_embed")
    original.model.langevin_dynamics_noise_std.data.fill_(2.5)
    checkpoint = save(original, tmp_path / "last.ckpt", argparse.Namespace(**hyper))
    recipe = convert(checkpoint, tmp_path / "w.safetensors")[0].recipe
    m, t = recipe.model, recipe.thinking
    assert (m.num_layers, m.num_attention_heads, m.hidden_size, m.ffn_hidden_size) == (LAYERS, HEADS, WIDTH, 48)
    assert (m.conditioning, m.norm_epsilon, recipe.data.sequence_length) == ("time_embed_sequence", 1e-3, 10)
    assert (t.max_steps, t.loss, t.gradient, t.step_size, t.step_size_scale) == (3, "last", "detached", 5.0, 2.0)
    assert (t.langevin_noise, t.replay.enabled, recipe.training.steps, recipe.optimizer.lr) == (2.5, True, 77, 0.0012)
    assert (t.initial, t.initial_std) == ("noise", 1)  # the public code's default
    assert recipe.data.learn_from == "text"
    path = save(original, tmp_path / "tuned.ckpt", hyper | {"execution_mode": "finetune"})
    described, _ = convert(path, tmp_path / "tuned.safetensors")
    assert described.recipe.data.learn_from == "answers" and "--answers-after '[[Answer]]: '" in described.prepare
    assert to_yaml(load_recipe(tmp_path / "w.yaml")) == to_yaml(recipe)


def test_random_numbers_of_steps(tmp_path):
    hyper = {**HYPER, "mcmc_num_steps": 1, "randomize_mcmc_num_steps": 2, "randomize_mcmc_num_steps_min": 2}
    recipe = convert(save(Original(), tmp_path / "last.ckpt", hyper), tmp_path / "w.safetensors")[0].recipe
    assert (recipe.thinking.min_steps, recipe.thinking.max_steps) == (2, 3)


def test_the_epsilon_reaches_the_norms(tmp_path):
    batch, dtype = text_batch(), torch.float64
    original = Original(epsilon=0.1).to(dtype)
    model, recipe = imported(original, tmp_path, "default", dtype, norm_eps=0.1)
    _, energies, *_ = next(original.think(batch.observed, batch.targets, noise(batch, dtype), True))
    close(thinker(model, recipe, batch, noise(batch, dtype)).think(1).energies[0].t(), energies.detach(), dtype)


def test_the_baseline(tmp_path):
    """Losses and the gradient of every weight of the public code's Transformer++."""
    original, batch, dtype = Baseline().double(), text_batch(), torch.float64
    model, recipe = imported(original, tmp_path, None, dtype, model_name="baseline_transformer")
    assert recipe.model.architecture == "baseline"
    theirs = original(batch.observed, batch.targets)
    ours = model(batch.observed, batch.targets)
    weight = position_weight(batch, dtype)
    close(ours.t().to(dtype), theirs.detach(), torch.float32)  # its cross-entropy is in float32
    (weight.t() * theirs).sum().backward()
    (weight * ours).sum().backward()
    expected = convert_weights({k: p.grad for k, p in original.named_parameters()}, recipe)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 20 * TOLERANCE[torch.float32], name


@pytest.mark.parametrize("prefix", ["model._orig_mod.", "module.model.", "model.module._orig_mod."])
def test_names_of_wrappers_are_left_out(prefix, tmp_path):
    """As torch.compile and DistributedDataParallel put them before a weight's own."""
    state = Original().state_dict()
    renamed = {f"{prefix}{k.removeprefix('model.')}": v for k, v in state.items()}
    path = save(Original(), tmp_path / "last.ckpt", **dict.fromkeys(state), **renamed)
    assert read_checkpoint(path, trust=False)[0].keys() == state.keys()


def test_states_of_metrics_are_left_out_and_named_once(tmp_path):
    names = [f"torchmetrics_dict.{phase}_accuracy.tp" for phase in ("train", "valid")]
    path = save(Original(), tmp_path / "last.ckpt", **{name: torch.zeros(3) for name in names})
    assert convert(path, tmp_path / "w.safetensors")[1] == {"states of metrics": names}
    done = CliRunner().invoke(app, [str(path), "--output", str(tmp_path / "again.safetensors")])
    assert done.exit_code == 0 and all(done.output.count(name) == 1 for name in names)


W1 = "model.transformer.layers.1.feed_forward.w1.weight"


@pytest.mark.parametrize(
    ("changes", "hyper", "message"),
    [
        ({"model.vocab_to_embed.weight": None}, {}, "model.vocab_to_embed.weight is missing"),
        ({"model.embeddings.weight": None}, {}, "model.embeddings.weight is missing"),
        ({W1: torch.zeros(5, 5)}, {}, rf"{W1} is \[5, 5\], expected \[48, 32\]"),
        ({"model.image_encoder.weight": torch.zeros(1)}, {}, "model.image_encoder.weight is not a weight of"),
        ({"model.transformer.time_embeddings.weight": torch.zeros(3, WIDTH)}, {}, "time_embeddings.weight is not a"),
        ({}, {"ebt_type": "time_embed"}, "model.transformer.time_embeddings.weight is missing"),
        ({}, {"ebt_type": "adaln"}, "model.transformer.time_embeddings.weight is missing"),
        ({}, {"ebt_type": "other"}, "hyper-parameter ebt_type=other is not supported, only default and time_embed"),
        ({}, {"model_name": "baseline_transformer"}, "model.output.weight is missing"),
        ({}, {"multiheaded_attention_heads": None}, "hyper-parameter multiheaded_attention_heads=None: a number"),
        ({}, {"mcmc_num_steps": None}, "hyper-parameter mcmc_num_steps=None: a number"),
        ({}, {"mcmc_step_size": "big"}, "hyper-parameter mcmc_step_size=big: a number"),
        ({}, {"ebt_type": None}, "hyper-parameter ebt_type=None is not supported"),
        ({}, {"model_name": "dit"}, "hyper-parameter model_name=dit"),
        ({}, {"normalize_initial_condition": False}, "hyper-parameter normalize_initial_condition=False"),
        ({}, {"optimizer": "lars"}, "hyper-parameter optimizer=lars is not supported, only adamw"),
        ({}, {"warm_up_base_lr_divider": 20}, "hyper-parameter warm_up_base_lr_divider=20"),
        ({}, {"contrastive_loss": True}, "hyper-parameter contrastive_loss=True"),
        ({}, {"soften_target_prob_dist": 0.1}, "hyper-parameter soften_target_prob_dist=0.1"),
        ({}, {"energy_loss_coeff": 0.1}, "hyper-parameter energy_loss_coeff=0.1"),
        ({}, {"out_of_bounds_loss_coeff": 0.1}, "hyper-parameter out_of_bounds_loss_coeff=0.1"),
        ({}, {"reconstruction_coeff": 0.5}, "hyper-parameter reconstruction_coeff=0.5"),
        ({}, {"langevin_dynamics_noise_learnable": True}, "hyper-parameter langevin_dynamics_noise_learnable=True"),
        (
            {},
            {"mcmc_replay_buffer": True, "mcmc_replay_buffer_sample_bs_percent": 0.25},
            "hyper-parameter mcmc_replay_buffer_sample_bs_percent=0.25",
        ),
        ({}, {"randomize_mcmc_num_steps": 2}, "repeat every step at random; only the last is repeated here"),
        (
            {W1: torch.zeros(50, WIDTH), W1.replace(".1.", ".0."): torch.zeros(50, WIDTH)},
            {},
            "model.ffn_hidden_size=50",
        ),
        ({}, {"sharpen_predicted_distribution": 0.5}, "hyper-parameter sharpen_predicted_distribution=0.5"),
    ],
)
def test_what_is_not_supported_is_named(changes, hyper, message, tmp_path):
    path = save(Original(), tmp_path / "last.ckpt", {**HYPER, **hyper}, **changes)
    with pytest.raises(RecipeError, match=message) as error:
        convert(path, tmp_path / "w.safetensors")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("w.*"))


class Logger:
    """Something a checkpoint may hold that is not data."""


def test_files_that_are_not_such_checkpoints(tmp_path):
    path = save(Original(), tmp_path / "objects.ckpt", {**HYPER, "logger": Logger()})
    with pytest.raises(RecipeError, match="--trust"):
        convert(path, tmp_path / "w.safetensors")
    convert(path, tmp_path / "w.safetensors", trust=True)
    (tmp_path / "text.ckpt").write_text("nothing")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    for name, message in (("text", "cannot be read"), ("none", "No such file"), ("other", "state_dict is missing")):
        with pytest.raises(RecipeError, match=message):
            convert(tmp_path / f"{name}.ckpt", tmp_path / "w.safetensors")


def test_from_the_command_line_to_an_evaluation(tmp_path):
    from ebt_megatron.evaluation.evaluate import evaluate
    from ebt_megatron.session import open_run
    from ebt_megatron.tools.convert import app as convert_app

    shards = text_shards(tmp_path, [f"Document {i} says {i % 7} words" * 9 for i in range(60)], 10, 500)
    vocab = ShardFolder(f"{shards}/train").manifest.tokenizer["vocab_size"]
    checkpoint = save(Original("time_embed", vocab=vocab), tmp_path / "last.ckpt", {**HYPER, "ebt_type": "time_embed"})
    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    done = CliRunner().invoke(app, [str(checkpoint), "--output", str(weights)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(
        convert_app,
        [
            "import",
            str(weights),
            "--recipe",
            str(tmp_path / "w.yaml"),
            "--output",
            str(run),
            f"data.train=[{shards}/train]",
            f"data.validation=[{shards}/validation]",
            "training.global_batch_size=4",
            "training.micro_batch_size=2",
            "training.validation_samples=4",
        ],
    )
    assert done.exit_code == 0, done.output
    with open_run(run) as opened:
        result = evaluate(opened, steps=2, example=False)
    assert result["step"] == 0 and all(math.isfinite(row["loss"]) for row in result["thinking"])
