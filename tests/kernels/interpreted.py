"""The Triton kernels in Triton's interpreter; `test_triton.py` runs this in a process of its own."""

import pytest
import torch

from ebt_megatron import kernels
from ebt_megatron.kernels import check
from tests.kernels.test_backends import assert_close, poisoned_memory  # noqa: F401  (a fixture)

backend = kernels.select("triton")
DTYPES = [torch.float32, torch.bfloat16]

# length, batch, heads, groups, size: odd, several blocks, grouped queries, one position
SHAPES = [(70, 1, 2, 1, 8), (33, 2, 2, 2, 20), (1, 1, 1, 1, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_prediction_attention(shape, tangent, documents, dtype):
    assert_close(check.attention_case("prediction_attention", *shape, tangent, documents), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_full_attention(shape, tangent, dtype):
    assert_close(check.attention_case("full_attention", *shape, tangent), dtype, backend)


@pytest.mark.parametrize("documents", [False, True])
def test_context_attention(documents):
    case = check.attention_case("context_attention", 70, 1, 2, 1, 8, False, documents)
    assert_close(case, torch.float32, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_elementwise(op, tangent, dtype):
    assert_close(check.elementwise_case(op, 5, 3, 33, tangent), dtype, backend)


def test_keys_need_no_gradient_while_proposing():
    case = check.attention_case("prediction_attention", 20, 1, 2, 1, 8, False)
    q, k_self, v_self, k, v = (a.float() for a in case.args)
    q.requires_grad_()
    backend.prediction_attention(q, k_self, v_self, k, v, tangent=False).sum().backward()
    expected = q.grad.clone()
    q.grad = None
    kernels.select("reference").prediction_attention(q, k_self, v_self, k, v, tangent=False).sum().backward()
    torch.testing.assert_close(expected, q.grad)
