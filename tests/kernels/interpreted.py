"""The Triton kernels in Triton's interpreter; `test_triton.py` runs this in a process of its own."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ebt_megatron import kernels
from ebt_megatron.kernels import check, fp8, noise, triton_attention, triton_vocabulary
from tests.kernels.test_backends import NARROW, assert_close, poisoned_memory  # noqa: F401  (a fixture)

backend = kernels.select("triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# length, batch, heads, groups, size: two blocks and grouped queries; odd sizes; one position
LONG, ODD, SINGLE = (70, 1, 2, 1, 8), (33, 2, 2, 2, 20), (1, 1, 1, 1, 32)


@pytest.fixture(autouse=True)
def bfloat16_of_a_gpu(monkeypatch):
    """The interpreter (triton 3.9) multiplies bfloat16 matrices as the integers of their bits; a GPU, as numbers.

    It cuts off what does not fit into bfloat16; a GPU rounds.
    """
    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def numbers(a):
        if not a.dtype.scalar.is_bf16():
            return a
        wide = (a.data.astype(np.uint32) << 16).view(np.float32)  # exact: bfloat16 is the upper half of float32
        return TensorHandle(wide, tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, numbers(a), numbers(b), *rest)

    def cast_impl(self, src, to):
        if (src.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, to)
        rounded = torch.from_numpy(np.array(src.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), to.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@pytest.fixture
def fp8_casts(monkeypatch):
    """The interpreter (triton 3.9) drops the carry where rounding to 8 bits reaches the next power of two."""

    def create_fp_to_fp(self, a, to, rounding):
        assert (a.dtype.scalar, to.scalar) == (tl.float32, tl.float8e4nv)
        return TensorHandle(torch.from_numpy(a.data).to(fp8.FP8).view(torch.uint8).numpy(), to.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)


@pytest.mark.parametrize(
    ("shape", "tangent", "documents", "dtype"),
    [
        (LONG, True, False, torch.float32),
        (LONG, True, True, torch.float32),
        (LONG, False, True, torch.float32),
        (ODD, True, False, torch.float32),
        (ODD, True, True, torch.float16),
        (ODD, False, False, torch.float16),
        (LONG, True, True, torch.bfloat16),
        (ODD, True, False, torch.bfloat16),
        (ODD, False, True, torch.bfloat16),
        (SINGLE, True, False, torch.float32),
        (SINGLE, False, False, torch.float32),
    ],
)
def test_prediction_attention(shape, tangent, documents, dtype):
    assert_close(check.attention_case("prediction_attention", *shape, tangent, documents), dtype, backend)


@pytest.mark.parametrize(
    ("shape", "tangent", "dtype"),
    [
        (LONG, True, torch.float32),
        (ODD, True, torch.float16),
        (ODD, False, torch.float32),
        (ODD, True, torch.bfloat16),
    ],
)
def test_full_attention(shape, tangent, dtype):
    assert_close(check.attention_case("full_attention", *shape, tangent), dtype, backend)


@pytest.mark.parametrize(
    ("documents", "dtype"),
    [
        (False, torch.float32),
        (True, torch.float32),
        (True, torch.bfloat16),
    ],
)
def test_context_attention(documents, dtype):
    case = check.attention_case("context_attention", 70, 1, 2, 1, 8, False, documents)
    assert_close(case, dtype, backend)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("op", "tangent"),
    [
        ("prediction_attention", True),
        ("prediction_attention", False),
        ("full_attention", True),
        ("context_attention", False),
    ],
)
@pytest.mark.parametrize(("blocks", "together"), [((16, 16), 1), ((32, 16), 4), ((16, 32), 9), ((16, 64), 20)])
def test_blocks_of_any_shape(op, tangent, documents, blocks, together, monkeypatch):
    """Blocks of queries and of keys need not be of one size, nor divide the length, nor fit rows seen together."""
    options = {"BM": blocks[0], "BN": blocks[1], "BH": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(triton_attention, "launch_options", lambda *_: options)
    if op == "full_attention" and documents:
        pytest.skip("images have no documents")
    case = check.attention_case(op, 40, 1, 2, 1, 8, tangent, documents, block=together)
    assert_close(case, torch.float32, backend)


# Not the very smallest, where results cancel to nothing and float32 has no relative accuracy.
ANY = settings(max_examples=12, deadline=None, derandomize=True)


@ANY
@given(
    op=st.sampled_from(["prediction_attention", "context_attention", "full_attention"]),
    length=st.integers(1, 70),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    repeat=st.integers(1, 2),
    half_size=st.integers(1, 20),
    tangent=st.booleans(),
    documents=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 4, 9, 40]),
)
def test_attention_of_any_shape(op, length, batch, groups, repeat, half_size, tangent, documents, dtype, seed, block):
    tangent &= op != "context_attention"
    documents &= op != "full_attention"
    shape = length, batch, groups * repeat, groups, 2 * half_size
    assert_close(check.attention_case(op, *shape, tangent, documents, seed, block), dtype, backend)


@ANY
@given(
    op=st.sampled_from(["rms_norm", "swiglu"]),
    length=st.integers(1, 9),
    batch=st.integers(1, 3),
    width=st.integers(4, 70),
    tangent=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_elementwise_of_any_shape(op, length, batch, width, tangent, dtype, seed):
    assert_close(check.elementwise_case(op, length, batch, width, tangent, seed), dtype, backend)


@ANY
@given(
    op=st.sampled_from(check.VOCAB_OPERATIONS),
    tokens=st.integers(3, 11),
    valid=st.integers(8, 70),
    padding=st.integers(0, 20),
    width=st.integers(4, 12),
    seed=st.integers(0, 1000),
)
def test_vocabulary_of_any_shape(op, tokens, valid, padding, width, seed):
    with pytest.MonkeyPatch.context() as patch:
        several_tiles(patch)
        assert_close(check.vocab_case(op, tokens, valid + padding, valid, width, seed), torch.float32, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_elementwise(op, tangent, dtype):
    assert_close(check.elementwise_case(op, 5, 3, 33, tangent), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "queries", "size"), [(2, 1, 8), (1, 3, 10), (3, 2, 200), (1, 1, 2)])
def test_heads(groups, queries, size, dtype):
    assert_close(check.heads_case(5, 3, groups, queries, size), dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(37, 150), (1, 1), (64, 16)])
def test_rounding_to_fp8_is_bit_for_bit_that_of_every_backend(rows, columns, transposed, dtype, fp8_casts):
    x = check.rounding_case(rows, columns, transposed).args[0].to(dtype)
    (ours, our_scale), (theirs, their_scale) = backend.round_rows(x), fp8.round_rows(x)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(our_scale, their_scale)
    assert ours.is_contiguous()
    for unusual in (torch.nan, torch.inf, -torch.inf):
        x[-1, -1] = unusual
        assert backend.round_rows(x)[1].isnan().flatten().tolist() == [False] * (rows - 1) + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", check.VOCAB_OPERATIONS)
def test_vocabulary(op, dtype, small_tiles):
    assert_close(check.vocab_case(op, 7, 53, 50, 8), dtype, backend)


@pytest.mark.parametrize("op", NARROW)
def test_what_is_made_of_narrow_logits_is_made_of_rounded_ones(op, small_tiles):
    assert_close(check.vocab_case(op, 7, 53, 50, 8), torch.bfloat16, backend, tolerance=3e-4)


@pytest.fixture
def small_tiles(monkeypatch):
    several_tiles(monkeypatch)


def several_tiles(patch: pytest.MonkeyPatch) -> None:
    """Several tiles of tokens and columns, several blocks in a tile."""
    patch.setattr(triton_vocabulary.TritonTiles, "token_tile", 4)
    patch.setattr(triton_vocabulary.TritonTiles, "column_tile", 20)
    patch.setattr(triton_vocabulary, "_BLOCK", 16)


def test_noise_is_that_of_every_backend():
    keys = noise.row_keys(torch.arange(3) + 10**12, torch.arange(4), stream=2)
    ours, theirs = (torch.ones(12, 3001) for _ in range(2))
    triton_vocabulary.add_noise_(ours, keys, 40_000, 0.3, 2**40 + 7)
    noise.add_noise_(theirs, keys, 40_000, 0.3, 2**40 + 7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for y, backend_noise in ((ours, triton_vocabulary), (theirs, noise)):
        y.copy_(rounded := y.bfloat16())
        backend_noise.add_noise_(rounded, keys, 40_000, 0.3, 2**40 + 7)  # summed in fp32, then rounded
        y.copy_(rounded)
    assert (ours != theirs).float().mean() < 1e-3  # a sum in the middle of two numbers may go either way


def test_keys_need_no_gradient_while_proposing():
    case = check.attention_case("prediction_attention", 20, 1, 2, 1, 8, False)
    q, k_self, v_self, k, v = (a.float() for a in case.args)
    q.requires_grad_()
    backend.prediction_attention(q, k_self, v_self, k, v, tangent=False).sum().backward()
    expected = q.grad.clone()
    q.grad = None
    kernels.select("reference").prediction_attention(q, k_self, v_self, k, v, tangent=False).sum().backward()
    torch.testing.assert_close(expected, q.grad)
