"""Pictures: exact gradients of a joint energy in every mode, the same losses on every layout, and the noise."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ebt_megatron.config import ImagesConfig, RecipeError
from ebt_megatron.core.errors import DataError
from ebt_megatron.data.decoder import Decoder
from ebt_megatron.objectives.validation import validate
from ebt_megatron.tasks.diffusion import NoiseSchedule
from ebt_megatron.tasks.images import Images
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.cases import slow
from tests.distributed_utils import run_ranks
from tests.tasks import latents

CPU = torch.device("cpu")

RANDOM = ("thinking.step_size_scale=2",)
MODES = {
    "S1, one step": (Plan((1.0,), "detached"), RANDOM),
    "S1": (Plan((0.5, 0.5), "detached"), RANDOM),
    "S1, one landscape": (Plan((0.5, 0.5), "detached"), (*RANDOM, "model.conditioning=none", "images.classes=false")),
    "S2": (Plan((0, 0, 1.0), "detached"), (*RANDOM, "thinking.langevin_noise=0.5", "model.conditioning=none")),
    "full, from noise": (
        Plan((0.2, 0.3, 0.5), "full"),
        (*RANDOM, "thinking.langevin_noise=0.5", "thinking.initial=noise"),
    ),
    "truncated": (Plan((0.2, 0.3, 0.5), "truncated"), RANDOM),
    "reuse": (Plan((0.5, 0.5), "detached"), (*RANDOM, "thinking.reuse=true")),
    "reuse, recomputed": (
        Plan((0.5, 0.5), "detached"),
        (*RANDOM, "thinking.reuse=true", "model.recompute_layers=true"),
    ),
    "recomputed": (Plan((0.5, 0.5), "detached"), (*RANDOM, "model.recompute_layers=true", "model.kernels=torch")),
    "captions as tokens": (Plan((0.5, 0.5), "detached"), (*RANDOM, *latents.CAPTIONS, "images.class_dropout=0.8")),
    "captions as vectors": (
        Plan((0.5, 0.5), "detached"),
        (*RANDOM, *latents.CAPTIONS, "name=vectors", "images.class_dropout=0.8"),
    ),
}


def trained(mode, engine, separable=False):
    """What came of it and gradients, with weights and step sizes that are uneven over the patches of a picture."""
    plan, overrides = MODES[mode]
    recipe = latents.pictures_recipe(*overrides)
    model = builders.build(recipe, task=latents.task(recipe))
    model.separable = separable
    thought = engine(model, recipe, latents.sample(recipe, latents.pictures(2)), plan)
    return thought, builders.gradients(model)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_double_backward(mode):
    expected, reference = trained(mode, builders.double_backward)
    thought, ours = trained(mode, builders.dual_stream)
    assert builders.relative_error(thought.losses, expected.losses) < 1e-12
    assert builders.relative_error(thought.energies, expected.energies) < 1e-12
    for name, gradient in reference.items():
        assert gradient.abs().max() > 0, name
        assert builders.relative_error(ours[name], gradient) < 1e-10, name


@pytest.mark.parametrize("mode", ["S1", "reuse", "full, from noise"])
def test_a_joint_energy_taken_for_separable_would_be_wrong(mode):
    """Uneven factors of a picture's patches must stay on their tangents."""
    _, reference = trained(mode, builders.double_backward)
    _, ours = trained(mode, builders.dual_stream, separable=True)
    assert builders.relative_error(ours["layers.0.qkv.weight"], reference["layers.0.qkv.weight"]) > 1e-2


def test_an_energy_begins_flat_and_its_head_learns_first():
    recipe = latents.pictures_recipe()
    builders.state(recipe)
    from ebt_megatron.tasks.build import build_model

    model = build_model(recipe, latents.task(recipe)).double()
    thought = builders.dual_stream(model, recipe, latents.sample(recipe, latents.pictures(2)), Plan((1.0,), "detached"))
    assert not thought.energies.any()
    learns = {name for name, gradient in builders.gradients(model).items() if gradient.any()}
    assert learns == {"head"}


RECIPES = {
    "S1": ("thinking.max_steps=2", "thinking.replay.enabled=true"),
    "S1, reuse": ("thinking.max_steps=2", "thinking.reuse=true"),
    "S2": (
        "thinking.loss=last",
        "thinking.learn_step_size=false",
        *RANDOM,
        "thinking.langevin_noise=0.5",
        "model.conditioning=none",
        "thinking.initial=noise",
    ),
    "S1, captions": ("thinking.max_steps=2", *latents.CAPTIONS, "images.class_dropout=0.3"),
    "DiT": ("model.architecture=baseline",),
    "DiT, captions": ("model.architecture=baseline", *latents.CAPTIONS, "images.class_dropout=0.3"),
    "DiT, learned variances": ("model.architecture=baseline", "images.learn_sigma=true"),
}


@pytest.fixture(scope="module")
def single():
    return latents.several(RECIPES, (), latents.pictures)


@pytest.mark.parametrize("layout", ["TP 2 + SP", "PP 2", slow("DP 2")])
def test_losses_do_not_depend_on_the_layout(layout, single):
    ranks = run_ranks(latents.several, 2, RECIPES, latents.LAYOUTS[layout], latents.pictures)
    for name, losses in single.items():
        assert ranks[0][name] == pytest.approx(losses, rel=1e-5), name


def test_noise_levels_and_classes_are_drawn_by_sample():
    recipe = latents.pictures_recipe("images.lowest_level=10", "images.highest_level=19", "images.class_dropout=0.5")
    task, batch = latents.task(recipe), latents.pictures(400)
    whole, part = (task.sample(b, torch.device("cpu")) for b in (batch, batch.part(100, 110)))
    levels, classes = whole.observed.unbind(1)
    assert levels.unique().tolist() == list(range(10, 20))
    told = classes < 3
    assert told.float().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(classes[told], batch.beside["labels"][told])
    assert torch.equal(part.start, whole.start[:, 100:110]) and torch.equal(part.observed, whole.observed[100:110])
    batch.counts = torch.ones(400, dtype=torch.bool)  # of validation
    assert torch.equal(task.sample(batch, torch.device("cpu")).observed[:, 1], batch.beside["labels"])


def test_some_pictures_start_on_the_way_to_the_clean_one():
    batch, given = latents.pictures(400), "thinking.initial=observed"
    plain, near = (
        latents.task(latents.pictures_recipe(given, f"thinking.starts_near_answer={share}")).sample(batch, CPU)
        for share in (0, 0.5)
    )
    distances = [(sample.first - sample.targets).flatten(1).norm(dim=1) for sample in (near, plain)]
    gone = 1 - distances[0] / distances[1]
    moved = gone > 1e-6
    assert moved.float().mean() == pytest.approx(0.5, abs=0.1) and gone[moved].mean() == pytest.approx(0.5, abs=0.1)
    task = latents.task(latents.pictures_recipe(given, "thinking.starts_near_answer=1"))
    batch.counts = torch.ones(400, dtype=torch.bool)  # of validation
    assert torch.equal(task.sample(batch, CPU).start, plain.start)
    with pytest.raises(RecipeError, match=r"set thinking.initial=observed"):
        latents.task(latents.pictures_recipe("thinking.initial=noise", "thinking.starts_near_answer=0.5"))


@pytest.mark.parametrize(("name", "nothing"), [("tokens", -1), ("vectors", 0)])
def test_some_captions_are_not_told_in_training(name, nothing):
    recipe = latents.pictures_recipe(*latents.CAPTIONS, f"name={name}", "images.class_dropout=0.5")
    task, batch = latents.task(recipe), latents.pictures(400)
    batch = latents.with_vectors(batch) if name == "vectors" else batch
    observed = task.sample(batch, torch.device("cpu")).observed
    told = (observed[:, 2:] != nothing).any(1)
    assert told.float().mean() == pytest.approx(0.5, abs=0.1) and not observed[:, 1].any()
    assert torch.equal(observed[told, 2:], batch.beside["captions"][told]) and (observed[~told, 2:] == nothing).all()
    assert torch.equal(task.unconditional(observed)[:, 0], observed[:, 0])
    batch.counts = torch.ones(400, dtype=torch.bool)  # of validation
    assert torch.equal(task.sample(batch, torch.device("cpu")).observed[:, 2:], batch.beside["captions"])


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [
        ((), [3]),
        ((*latents.CAPTIONS, "name=tokens"), [0, *[-1] * 5]),
        ((*latents.CAPTIONS, "name=vectors"), [0, *[0] * 6]),
    ],
)
def test_pictures_without_labels_or_captions_are_told_none(overrides, columns):
    task, batch = latents.task(latents.pictures_recipe(*overrides)), latents.pictures(2)
    batch.beside = {}
    observed = task.sample(batch, torch.device("cpu")).observed
    assert observed[:, 1:].tolist() == [columns] * 2 and torch.equal(task.unconditional(observed), observed)


def test_a_caption_is_its_tokens_in_their_order_and_nothing_after_them():
    recipe = latents.pictures_recipe(*latents.CAPTIONS)
    read = builders.build(recipe, task=latents.task(recipe)).modality.condition.captions
    tokens = torch.tensor([[3, 4, -1, -1, -1], [4, 3, -1, -1, -1], [3, 4, 7, 1, 2], [-1] * 5])
    first, turned, longer, nothing = read(tokens)
    assert torch.equal(nothing, read.not_told)
    for other in (turned, longer, nothing):
        assert not torch.allclose(first, other, rtol=1e-3)
    read.positions = torch.nn.Parameter(read.positions[:2])
    assert torch.allclose(read(tokens[:1, :2])[0], first, rtol=1e-12)


def test_a_noised_picture_has_the_schedules_variances():
    recipe = latents.pictures_recipe("model.architecture=baseline")
    task, batch = latents.task(recipe), latents.pictures(2000)
    sample = task.sample(batch, torch.device("cpu"), level=99)
    kept = task.schedule.kept[99].item()
    assert kept == pytest.approx(0.8969, abs=1e-3)  # prod of 1 - linspace(1e-4, 0.02, 1000) over 100 steps
    assert torch.allclose(
        sample.start.transpose(0, 1), kept**0.5 * batch.samples + (1 - kept) ** 0.5 * sample.targets, atol=1e-5
    )
    assert sample.targets.std() == pytest.approx(1, rel=0.02)


def test_the_right_noise_leads_back_to_the_picture():
    schedule = NoiseSchedule(ImagesConfig())
    clean, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x, levels = None, schedule.levels(499, 7)
    assert levels[0] == 499 and levels == sorted(levels, reverse=True) and len(levels) == 7
    at = [torch.full((3,), level) for level in levels]
    x = schedule.noised(clean, noise, at[0])
    for level, to in zip(at, [*at[1:], None], strict=True):
        x = schedule.step(x, noise, level, to)
    assert torch.allclose(x, clean)


def test_an_ancestral_step_keeps_the_variance_of_the_level():
    schedule = NoiseSchedule(ImagesConfig())
    level, to = torch.full((1,), 600), torch.full((1,), 300)
    clean, noise, fresh = torch.zeros(1, 200, 200), torch.randn(1, 200, 200), torch.randn(1, 200, 200)
    x = schedule.step(schedule.noised(clean, noise, level), noise, level, to, fresh)
    assert x.square().mean() == pytest.approx(1 - schedule.kept[300].item(), rel=0.03)


@pytest.mark.parametrize("at", [0, 1, 400, 999])
def test_the_variational_bound_is_the_divergence_of_two_gaussians(at):
    """Both made from their definitions: DDPM's posterior, and the same with a predicted picture and variance."""
    schedule = NoiseSchedule(ImagesConfig())
    clean, noise, predicted, v = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    level = torch.full((2,), at)
    beta, kept, before = schedule.betas[at], schedule.kept[at], schedule.kept[at - 1] if at else torch.tensor(1.0)
    noised = schedule.noised(clean, noise, level)

    def mean(picture):
        return (before.sqrt() * beta * picture + (1 - beta).sqrt() * (1 - before) * noised) / (1 - kept)

    least = (1 - before) / (1 - kept) * beta if at else schedule.bounds[0, 0].exp()
    ours = Normal(mean(schedule.clean(noised, predicted, level)), (beta**v * least ** (1 - v)).sqrt())
    expected = kl_divergence(Normal(mean(clean), least.sqrt()), ours) if at else -ours.log_prob(clean)
    found = schedule.variational_bound(noise, predicted, v, level, noised)
    assert builders.relative_error(found, expected) < 1e-9  # 0.001 of the T = 1000 terms
    bits = schedule.bound_in_bits(noise, predicted, v, level, noised)
    if at:
        assert builders.relative_error(bits, expected / math.log(2)) < 1e-9
    else:  # of values in steps of 2 / 255
        clean[0, 0, :2] = torch.tensor([-1.0, 1.0])
        noised = schedule.noised(clean, noise, level)
        ours = Normal(mean(schedule.clean(noised, predicted, level)), ours.scale)
        above = torch.where(clean > 0.999, 1.0, ours.cdf(clean + 1 / 255))
        below = torch.where(clean < -0.999, 0.0, ours.cdf(clean - 1 / 255))
        found = schedule.bound_in_bits(noise, predicted, v, level, noised)
        sure = above - below > 1e-3  # where the tanh in place of the error function is near enough
        assert sure.sum() > 5 and torch.allclose(2 ** -found[sure], (above - below)[sure], atol=2e-3)


def test_levels_of_a_dit():
    for levels, low, high in (("all", 0, 999), ("range", 10, 19)):
        recipe = latents.pictures_recipe(
            "model.architecture=baseline",
            "images.lowest_level=10",
            "images.highest_level=19",
            f"images.dit_levels={levels}",
        )
        drawn = latents.task(recipe)._levels(torch.arange(3000))
        assert low <= drawn.min() <= low + 20 and high - 20 <= drawn.max() <= high


def test_step_sizes_of_a_picture_are_one():
    """Its patches share an energy: each sample has a factor of its own, and its patches one."""
    recipe = latents.pictures_recipe("thinking.step_size_scale=2")
    model, sample = builders.build(recipe, task=latents.task(recipe)), latents.sample(recipe, latents.pictures(2))
    alpha = builders.new_descent(model, recipe, sample).alpha
    assert (alpha == alpha[:1]).all() and alpha[0, 0] != alpha[0, 1]


def test_a_learned_variance_is_between_those_of_ddpm():
    schedule = NoiseSchedule(ImagesConfig())
    level = torch.tensor([1, 500, 999])
    zero, one = torch.zeros(3, 1, 1, dtype=torch.float64), torch.ones(3, 1, 1, dtype=torch.float64)
    posterior = schedule.betas[level] * (1 - schedule.kept[level - 1]) / (1 - schedule.kept[level])
    assert torch.allclose(schedule.log_variance(zero, level).exp().flatten(), posterior, rtol=1e-12)
    assert torch.allclose(schedule.log_variance(one, level).exp().flatten(), schedule.betas[level], rtol=1e-12)


@pytest.mark.parametrize("fresh", [0.0, 1.0])
def test_a_random_step_has_the_learned_variance_and_ddpms_mean(fresh):
    schedule, at, to = NoiseSchedule(ImagesConfig()), torch.tensor([600]), torch.tensor([599])
    noised, noise, v = torch.randn(3, 1, 4, 5, dtype=torch.float64)
    random = torch.full_like(noised, fresh)
    beta, kept = schedule.betas[600], schedule.kept[600]
    mean = (noised - beta / (1 - kept).sqrt() * noise) / (1 - beta).sqrt()
    expected = mean + fresh * (schedule.log_variance(v, at) / 2).exp()
    assert torch.allclose(schedule.step(noised, noise, at, to, random, v), expected, rtol=1e-9)


@pytest.mark.parametrize("told", [(), ("name=vectors", *latents.CAPTIONS)], ids=["classes", "captions"])
def test_learning_a_variance_leaves_the_learning_of_the_noise_alone(told):
    """Its mean is a constant: the rows of the noise get the gradient of the mean squared error alone."""
    recipe = latents.pictures_recipe("model.architecture=baseline", "images.learn_sigma=true", *told)
    model = builders.build(recipe, task=latents.task(recipe))
    sample = latents.sample(recipe, latents.pictures(2))
    noise = model.predicted(sample.observed, sample.start)[..., :2]
    (noise - sample.targets.transpose(0, 1)).square().mean(-1).sum().backward()
    expected, model.head.grad = model.head.grad, None
    model(sample.observed, sample.targets, None, sample.start).sum().backward()
    assert torch.allclose(model.head.grad[:2], expected[:2], rtol=1e-12)
    assert not expected[2:].any() and model.head.grad[2:].abs().min() > 0


def test_validation_knows_the_psnr_of_every_step():
    recipe = latents.pictures_recipe("images.lowest_level=99", "images.highest_level=99")
    task = latents.task(recipe)
    task.decoder = Decoder(20 * torch.eye(2), torch.full((2,), 128.0), 2, 2, 1)
    model = builders.build(recipe, torch.float32, task)
    batch = latents.pictures(4)
    batch.counts = torch.tensor([True, True, True, False])
    measures = validate(builders.objective(model, recipe, task), [batch], 3).measures
    assert len(measures["psnr"]) == 3
    error = 20 * (task.sample(batch, torch.device("cpu")).start.transpose(0, 1)[:3] - batch.samples[:3])
    assert measures["noised_psnr"] == pytest.approx(
        20 * torch.log10(255 / error.square().mean().sqrt()).item(), abs=0.1
    )


@pytest.mark.parametrize(
    ("overrides", "arguments", "why"),
    [
        (("data.sequence_length=5",), {}, "pictures have 4 patches: set data.sequence_length=4"),
        (("model.conditioning=time_embed",), {}, "pictures have none .* or adaln_zero"),
        (("model.energy_head=quadratic",), {}, "model.energy_head=quadratic: the energy of a picture has linear alone"),
        (("images.learn_sigma=true",), {}, "images.learn_sigma is about a DiT's random steps"),
        (("model.num_query_groups=2",), {}, "one group for each head"),
        (
            ("images.classes=false", "images.see_level=false", "images.condition_vector=false"),
            {},
            "images.condition_vector=false leaves the layers without a condition",
        ),
        ((), {"classes": 0}, "images.classes=true needs labels, and the shards have none"),
        (latents.CAPTIONS, {"captions": {}}, "images.captions=true needs captions, and the shards have none"),
        ((), {"grid": (3, 2)}, "pictures of 4 patches are no 3 x 2"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, arguments, why):
    with pytest.raises((RecipeError, DataError), match=why):
        Images(latents.pictures_recipe(*overrides), [4, 2], **{"classes": 3} | arguments)


def test_class_and_caption_at_once_are_refused():
    with pytest.raises(RecipeError, match=r"images.classes=true and images.captions=true: a picture has one condition"):
        latents.pictures_recipe("images.captions=true")


def test_levels_beyond_the_schedule_are_refused():
    with pytest.raises(RecipeError, match=r"images.lowest_level=5, highest_level=1000: must rise and be below"):
        latents.pictures_recipe("images.lowest_level=5", "images.highest_level=1000")
