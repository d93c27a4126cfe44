"""Every operation of every backend equals the float64 reference: outputs, gradients, in-place results."""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from ebt_megatron import kernels
from ebt_megatron.kernels import StepRule, check
from ebt_megatron.kernels.vocabulary import Tiles
from tests.cases import thinned

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ATTENTION = ["prediction_attention", "context_attention", "full_attention"]
ELEMENTWISE = ["rms_norm", "layer_norm", "swiglu", "gelu", "add_gated"]
torch_backend = kernels.select("torch")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised tensors hold NaN, so that a result which was never written shows."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def assert_close(
    case: check.Case, dtype: torch.dtype, backend: kernels.Kernels = torch_backend, tolerance: float | None = None
) -> None:
    for name, error in check.errors(backend, case, dtype).items():
        assert error <= (tolerance or TOLERANCE[dtype]), f"{case.op}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("op", ATTENTION)
def test_attention(op, tangent, dtype):
    if op == "context_attention" and tangent:
        pytest.skip("the context has no tangent")
    assert_close(check.attention_case(op, 150, 2, 4, 2, 16, tangent), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("queries", "keys", "batch", "groups"), [(1, 40, 1, 4), (8, 33, 3, 2)])
def test_attention_over_a_cache(queries, keys, batch, groups, own, dtype):
    assert_close(check.cached_case(queries, keys, batch, 4, groups, 16, own), dtype)


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(ATTENTION),
    length=st.integers(1, 140),
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    repeat=st.integers(1, 3),
    half_size=st.integers(1, 20),
    tangent=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 2, 9, 130]),
)
def test_attention_of_any_shape(op, length, batch, groups, repeat, half_size, tangent, documents, seed, block):
    tangent &= op != "context_attention"
    case = check.attention_case(
        op,
        length,
        batch,
        groups * repeat,
        groups,
        2 * half_size,
        tangent,
        documents and op != "full_attention",
        seed,
        block,
    )
    assert_close(case, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise(op, tangent, dtype):
    assert_close(check.elementwise_case(op, 5, 3, 33, tangent), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("queries", [1, 3])
def test_heads(queries, dtype):
    assert_close(check.heads_case(5, 3, 2, queries, 8), dtype)


def test_heads_are_rotated_by_their_angle():
    mixed, angle = torch.randn(4, 1, 3 * 2, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    table = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    q, k, v = torch_backend.split_heads(mixed, table, 1, 2)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], 1)
    for i, head in enumerate((q, k)):
        torch.testing.assert_close(head[:, 0, 0], (turn @ mixed[:, 0, 2 * i : 2 * i + 2, None])[..., 0])
    torch.testing.assert_close(v[:, 0, 0], mixed[:, 0, 4:])


@pytest.mark.parametrize(("op", "dtype"), thinned(check.VOCAB_OPERATIONS, TOLERANCE, every=2))
def test_vocabulary(op, dtype):
    assert_close(check.vocab_case(op, 300, 5000, 4990, 12), dtype)  # several tiles each way


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(check.VOCAB_OPERATIONS),
    tokens=st.integers(1, 20),
    valid=st.integers(1, 70),
    padding=st.integers(0, 20),
    width=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_vocabulary_of_any_shape(op, tokens, valid, padding, width, seed):
    assert_close(check.vocab_case(op, tokens, valid + padding, valid, width, seed), torch.float64)


NARROW = [op for op in check.VOCAB_OPERATIONS if "narrow" in op]


@pytest.mark.parametrize("op", NARROW)
def test_what_is_made_of_narrow_logits_is_made_of_rounded_ones(op):
    """The error is that of fp32 sums, far below what rounding a logit changes."""
    assert_close(check.vocab_case(op, 20, 300, 290, 8), torch.bfloat16, tolerance=3e-4)


def test_views_with_strides_are_taken_as_they_are():
    """Heads come as views of one projection, with unit stride in the last dimension only."""
    heads = torch.randn(9, 4, 3 * 2 * 8, dtype=torch.float64).unflatten(-1, (2, 3 * 8))
    q, k_self, v_self = heads.split(8, -1)
    k, v = torch.randn(9, 2, 2, 16, dtype=torch.float64).split(8, -1)
    packed = [t.contiguous() for t in (q, k_self, v_self, k, v)]
    expected = kernels.select("reference").prediction_attention(*packed, tangent=True)
    torch.testing.assert_close(torch_backend.prediction_attention(q, k_self, v_self, k, v, tangent=True), expected)


@pytest.mark.parametrize("rule", list(StepRule))
def test_the_dense_adjoint_is_the_derivative_by_the_logits(rule):
    """`vocab_dense_backward` against autograd through softmax, in place of its written formula."""
    case = check.vocab_case(f"vocab_dense_backward, {rule}", 4, 13, 11, 5)
    y, _, table, valid, _, adjoint, scale, *_, x_grad, xt_grad, table_grad = case.args
    y, table = y[:, :valid].clone().requires_grad_(), table[:valid].clone().requires_grad_()
    p = y.softmax(-1)
    direction = scale[:, None] * adjoint[:, :valid]
    tangent = p * (direction - (p * direction).sum(-1, keepdim=True)) if rule.by_logits else direction
    value = (x_grad * (p @ table)).sum() + (xt_grad * (tangent @ table)).sum()
    start = (adjoint[:, :valid] * (p if rule.from_probabilities else y)).sum()
    want_adjoint, want_table = adjoint.clone(), table_grad.clone()
    by_y, by_table = torch.autograd.grad(value + start, [y, table])
    want_adjoint[:, :valid] = by_y
    want_table[:valid] += by_table
    kernels.select("reference").vocab_dense_backward(*case.args)
    torch.testing.assert_close(adjoint, want_adjoint)
    torch.testing.assert_close(table_grad, want_table)


def test_lost_tangent_terms_are_noticed():
    """The comparison itself: a backend that forgets the tangent of the keys is caught."""
    import dataclasses

    def forgetful(mixed, bias, size, *, tangent):
        mixed = mixed.unflatten(-1, (-1, 3, size)).clone()
        mixed[:, mixed.shape[1] // 2 :, :, 1] = 0
        return torch_backend.full_attention(mixed.flatten(2), bias, size, tangent=tangent)

    backend = dataclasses.replace(torch_backend, full_attention=forgetful)
    case = check.attention_case("full_attention", 6, 1, 2, 2, 4, True)
    assert max(check.errors(backend, case, torch.float64).values()) > 0.01


def test_attention_memory_is_linear_in_the_sequence():
    """No saved tensor has sequence length twice among its dimensions."""
    length, saved = 300, []
    case = check.attention_case("prediction_attention", length, 1, 1, 1, 8, True)
    args = [a.float().requires_grad_() for a in case.args]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        torch_backend.prediction_attention(*args, tangent=True)
    assert saved and max(saved) <= length * 8 * 4


class Allocations(TorchDispatchMode):
    """The largest storage that operations made, of those that were not there before."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("op", check.VOCAB_OPERATIONS)
def test_the_vocabulary_makes_no_temporary_of_its_width(op):
    tokens, columns = 40, 6000
    case = check.vocab_case(op, tokens, columns, columns, 8)
    args = check.arguments(case, torch.float32)
    with Allocations([a for a in args if isinstance(a, torch.Tensor)]) as seen:
        getattr(torch_backend, case.op)(*args)
    assert 0 < seen.largest <= tokens * Tiles.column_tile < tokens * columns


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="auto depends on the device only")
def test_selection():
    assert kernels.select("auto").name == ("triton" if torch.cuda.is_available() else "torch")
    with pytest.raises(ValueError, match="reference"):
        kernels.select("fast")
