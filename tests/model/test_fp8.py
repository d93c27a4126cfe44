"""Linear layers in fp8: the rounded products are right, and only their rounding differs from Megatron's layers."""

import pytest
import torch

from ebt_megatron import kernels
from ebt_megatron.config import RecipeError
from ebt_megatron.kernels.fp8 import round_rows
from ebt_megatron.model import fp8
from ebt_megatron.thinking.plan import Plan
from tests import builders
from tests.distributed_utils import run_ranks

try:
    fp8.require_products(kernels.select("torch"), torch.device("cpu"))
except RecipeError as error:
    pytest.skip(str(error), allow_module_level=True)

KERNELS = kernels.select("torch")
WAYS = [
    ("thinking.gradient=detached",),
    ("thinking.gradient=detached", "thinking.reuse=true"),
    ("thinking.gradient=full",),
    ("model.conditioning=time_embed_sequence",),
]
SIZES = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "data.sequence_length=33",
    "thinking.max_steps=2",
)


def matrices(rows: int, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("inner", [16, 64, 37, 1])  # odd ones are padded
def test_a_product_is_that_of_the_rounded_matrices(inner, dtype, tolerance):
    a, b = (m.to(dtype) for m in matrices(5, inner, 32))
    exact = [(m.double() * scale)[:, :inner] for m, scale in (round_rows(a), round_rows(b.mT))]
    expected = exact[0] @ exact[1].mT
    result = fp8.product(a, b, KERNELS)
    assert result.dtype == dtype
    assert builders.relative_error(result.double(), expected) <= tolerance
    assert builders.relative_error(expected, a.double() @ b.double()) <= 0.06  # e4m3 has three bits of mantissa


def test_small_rows_and_columns_are_as_exact_as_large_ones():
    a, b = matrices(5, 64, 32)
    expected = a.double() @ b.double()
    a[3] *= 1e-9
    b[:, 7] *= 1e6
    result = fp8.product(a, b, KERNELS).double()
    result[3] *= 1e9
    result[:, 7] *= 1e-6
    assert ((result - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 0.06


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    a, b = matrices(4, 16, 16)
    a[0], a[1, 2], a[2, 3] = 0, torch.nan, torch.inf
    assert round_rows(a)[1].isfinite().flatten().tolist() == [True, False, False, True]
    result = fp8.product(a, b, KERNELS)
    assert (result[0] == 0).all()
    assert not result[1].isfinite().any()
    assert not result[2].isfinite().any()
    assert result[3].isfinite().all()


def exact_product(a: torch.Tensor, b: torch.Tensor, kernels: kernels.Kernels) -> torch.Tensor:
    return a @ b


def gradient(way: tuple[str, ...], precision: str, dtype: torch.dtype) -> torch.Tensor:
    recipe = builders.small_recipe(*SIZES, *way, f"training.precision={precision}")
    model = builders.build(recipe, dtype)
    builders.dual_stream(model, recipe, builders.text_batch(2, 33), Plan.of(recipe.thinking, 2))
    return torch.cat([g.double().flatten() for g in builders.gradients(model).values()])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_with_exact_products_the_gradient_is_exact(way, monkeypatch):
    """Every way through the layers: only `product` may differ."""
    expected = gradient(way, "bf16", torch.float64)
    monkeypatch.setattr(fp8, "product", exact_product)
    assert builders.relative_error(gradient(way, "fp8", torch.float64), expected) <= 1e-12


def test_reuse_leaves_no_product_in_bf16(monkeypatch):
    """A learn pass has as many products with it as without: half as large."""
    counts = []
    for way in WAYS[:2]:
        calls: list[int] = []
        monkeypatch.setattr(fp8, "product", lambda a, b, _, calls=calls: calls.append(1) or a @ b)
        gradient(way, "fp8", torch.float64)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_gradient_points_the_same_way(way):
    """Eight bits are coarse: the cosines here are 0.77 to 0.95, where bf16's are above 0.999."""
    expected, result = gradient(way, "bf16", torch.float64), gradient(way, "fp8", torch.bfloat16)
    assert torch.cosine_similarity(result, expected, 0) >= 0.7


def layers_agree(sequence_parallel: bool) -> list[float]:
    """On this rank: how far outputs and gradients of our layers are from Megatron's, with exact products."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from ebt_megatron.parallel.setup import initialize, transformer_config

    fp8.product = exact_product
    recipe = builders.small_recipe(
        *SIZES,
        "data.sequence_length=32",
        "parallel.tensor=2",
        f"parallel.sequence_parallel={str(sequence_parallel).lower()}",
    )
    state = initialize(recipe.parallel, 1)
    config = transformer_config(recipe)
    shared = {"config": config, "init_method": torch.nn.init.normal_, "bias": False}
    pairs = [
        (ColumnParallelLinear, fp8.Fp8ColumnParallelLinear, (64, 96), {"gather_output": False}),
        (RowParallelLinear, fp8.Fp8RowParallelLinear, (96, 64), {"input_is_parallel": True, "skip_bias_add": True}),
    ]
    errors = []
    for theirs, ours, (inner, outer), options in pairs:
        layers = [theirs(inner, outer, **shared, **options), ours(inner, outer, kernels=KERNELS, **shared, **options)]
        weight = torch.randn(layers[0].weight.shape, generator=torch.Generator().manual_seed(state.tensor_rank))
        whole_input = theirs is ColumnParallelLinear
        generator = torch.Generator().manual_seed(5 if whole_input and not sequence_parallel else state.tensor_rank)
        length = 16 if sequence_parallel and whole_input else 32
        x = torch.randn(length, 3, inner if whole_input else inner // 2, generator=generator)
        found = []
        for layer in layers:
            layer.weight.data.copy_(weight)
            given = x.clone().requires_grad_()
            out, _ = layer(given)
            out.backward(torch.arange(out.numel()).view_as(out).remainder(7).float())
            found.append((out.detach(), given.grad, layer.weight.grad))
        errors += [builders.relative_error(a, b) for a, b in zip(*reversed(found), strict=True)]
    return errors


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_layers_communicate_as_megatrons(sequence_parallel):
    for errors in run_ranks(layers_agree, 2, sequence_parallel):
        assert max(errors) <= 1e-6


def test_a_device_without_such_products_is_refused(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Could not run 'aten::_scaled_mm_v2' on the 'CPU' backend.\nAnd so on")

    monkeypatch.setattr(fp8, "scaled_mm", refuse)
    with pytest.raises(RecipeError, match=r"has no 8-bit products on this CPU \(Could not run .*set bf16"):
        builders.build(builders.small_recipe("training.precision=fp8", *SIZES))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("thinking.engine=double_backward",), "cannot be differentiated twice"),
        (("model.hidden_size=24",), r"model.hidden_size=24 is not divisible by 16 x parallel.tensor=16"),
        (("parallel.tensor=2", "model.num_query_groups=2"), r"the keys' width=16 is not divisible by .*=32"),
    ],
)
def test_what_fp8_cannot_do_is_said_at_once(overrides, reason):
    with pytest.raises(RecipeError, match=reason):
        builders.small_recipe("training.precision=fp8", *overrides)


def trained(precision: str, *layout: str) -> list[float]:
    from tests.training.test_layouts import losses_of

    recipe = f"training.precision={precision}", "model.hidden_size=64", "thinking.max_steps=2", "thinking.step_size=1"
    return losses_of((*recipe, *layout), steps=4)


@pytest.mark.slow
def test_training_goes_as_in_fp32_on_every_layout():
    (expected,) = run_ranks(trained, 1, "fp32")
    for layout in (("parallel.tensor=2", "parallel.sequence_parallel=true"), ("parallel.pipeline=2",)):
        for losses in run_ranks(trained, 2, "fp8", *layout):
            assert losses == pytest.approx(expected, abs=0.03)  # rounding; a step changes the loss by 0.1 to 0.4
