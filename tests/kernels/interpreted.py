"""The Triton kernels in Triton's interpreter; `test_triton.py` runs this in a process of its own."""

import pytest
import torch

from ebt_megatron import kernels
from ebt_megatron.kernels import check
from tests.kernels.test_backends import assert_close, poisoned_memory  # noqa: F401  (a fixture)

backend = kernels.select("triton")
# The interpreter multiplies bfloat16 matrices as their bits (triton 3.9), so attention takes float16 here.
DTYPES = [torch.float32, torch.float16]

# length, batch, heads, groups, size: two blocks and grouped queries; odd sizes; one position
LONG, ODD, SINGLE = (70, 1, 2, 1, 8), (33, 2, 2, 2, 20), (1, 1, 1, 1, 32)


@pytest.mark.parametrize(("shape", "tangent", "documents", "dtype"), [
    (LONG, True, False, torch.float32), (LONG, True, True, torch.float32), (LONG, False, True, torch.float32),
    (ODD, True, False, torch.float32), (ODD, True, True, torch.float16), (ODD, False, False, torch.float16),
    (SINGLE, True, False, torch.float32), (SINGLE, False, False, torch.float32),
])  # fmt: skip
def test_prediction_attention(shape, tangent, documents, dtype):
    assert_close(check.attention_case("prediction_attention", *shape, tangent, documents), dtype, backend)


@pytest.mark.parametrize(("shape", "tangent", "dtype"), [
    (LONG, True, torch.float32), (ODD, True, torch.float16), (ODD, False, torch.float32),
])  # fmt: skip
def test_full_attention(shape, tangent, dtype):
    assert_close(check.attention_case("full_attention", *shape, tangent), dtype, backend)


@pytest.mark.parametrize("documents", [False, True])
def test_context_attention(documents):
    case = check.attention_case("context_attention", 70, 1, 2, 1, 8, False, documents)
    assert_close(case, torch.float32, backend)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
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
