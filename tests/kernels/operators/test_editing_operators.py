"""`nearest_token` and `blended_attention`: against float64, ties, zeros, NaN, memory, errors."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, tokens

from stem_kernels import blended_attention, nearest_token
from stem_kernels.measure import PeakMemory
from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.nearest_token import ROUNDING_ATOL as NEAREST_ATOL
from stem_kernels.shared.cosine import inverse_norms
from stem_kernels.testing import (
    cosine_loss,
    eager_blended_attention,
    eager_nearest_token,
    max_error,
    parity_bound,
)

pytestmark = [pytest.mark.thinned, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("n", "m", "width"), [(1, 1, 1), (70, 33, 40), (300, 1100, 37), (130, 257, 320)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.interpreter
def test_nearest_is_nearest(backend: str, dtype: torch.dtype, n: int, m: int, width: int) -> None:
    query, keys = tokens(2, n, width).to(dtype), tokens(2, m, width, seed=1).to(dtype)
    keys = keys * torch.linspace(0.1, 10, m, device=DEVICE).unsqueeze(-1).to(dtype)
    found = nearest_token(query, keys, backend=backend)
    assert found.dtype == torch.int32
    assert found.shape == (2, n)
    plain = cosine_loss(query, keys, eager_nearest_token(query, keys))
    assert cosine_loss(query, keys, found) <= 2 * plain + NEAREST_ATOL[dtype]
    if dtype == torch.float32:
        exact = eager_nearest_token(query.double(), keys.double())
        assert (found != exact).double().mean() <= 1e-3


def signed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens of ones and minus ones in 16 channels, so that their norm is 4.

    Products of matrices may add up equal columns in different orders, by their place. These sums,
    norms and cosines are exact in any order, and so are equal where the tokens are.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(shape)
    held[..., :16] = torch.randint(0, 2, (*shape[:-1], 16), generator=generator) * 2.0 - 1
    order = torch.rand(shape, generator=generator).argsort(-1)
    return held.gather(-1, order).to(DEVICE)


@pytest.mark.interpreter
def test_of_equal_cosines_the_first_counts(backend: str) -> None:
    keys = signed(1, 200, 24)
    keys = torch.cat([keys, 2 * keys, keys, 4 * keys, keys, 0.5 * keys], dim=1)
    query = signed(1, 130, 24, seed=1)
    found = nearest_token(query, keys, backend=backend)
    assert torch.equal(found, nearest_token(query, keys[:, :200], backend=backend))
    assert found.unique().numel() > 10


@pytest.mark.interpreter
def test_a_key_of_zeros_has_the_cosine_zero(backend: str) -> None:
    keys = torch.zeros(2, 70, 16, device=DEVICE)
    query = signed(2, 20, 16)
    assert not nearest_token(query, keys, backend=backend).any()  # all are equal
    keys[:, :40] = -query[:, :1]  # away from the first query, but not from its opposite
    pair = torch.cat([query[:, :1], -query[:, :1]], dim=1)
    found = nearest_token(pair, keys, backend=backend)
    assert found.tolist() == [[40, 0], [40, 0]]
    none = nearest_token(torch.zeros_like(query), tokens(2, 70, 16), backend=backend)
    assert not none.any()


@pytest.mark.interpreter
def test_numbers_of_keys_stay_in_range(backend: str) -> None:
    query, keys = tokens(1, 40, 16), tokens(1, 70, 16, seed=1)
    query[:, 3], query[:, 4] = float("nan"), float("inf")
    found = nearest_token(query, keys, backend=backend)
    assert int(found.min()) >= 0
    assert int(found.max()) < 70
    rest = torch.cat([found[:, :3], found[:, 5:]], dim=1)
    clean = torch.cat([query[:, :3], query[:, 5:]], dim=1)
    assert torch.equal(rest, nearest_token(clean, keys, backend=backend))


@pytest.mark.interpreter
def test_nearest_of_strided_tokens(backend: str) -> None:
    query, keys = tokens(2, 50, 3, 16), tokens(2, 60, 3, 16, seed=1)
    found = nearest_token(query[:, :, 1], keys[:, :, 1], backend=backend)
    copied = query[:, :, 1].contiguous(), keys[:, :, 1].contiguous()
    assert torch.equal(found, nearest_token(*copied, backend=backend))
    across = nearest_token(query[:, 0].mT, keys[:, 0].mT, backend=backend)
    copied = query[:, 0].mT.contiguous(), keys[:, 0].mT.contiguous()
    assert torch.equal(across, nearest_token(*copied, backend=backend))
    assert nearest_token(query[:, :0, 1], keys[:, :, 1], backend=backend).shape == (2, 0)


@pytest.mark.usefixtures("mapped_blocks")
def test_peak_memory_does_not_hold_the_products(backend: str) -> None:
    n, m, width = 8192, 4096, 64  # products have 2^27 bytes
    query, keys = tokens(1, n, width), tokens(1, m, width, seed=1)
    nearest_token(query, keys, backend=backend)
    with PeakMemory(DEVICE) as memory:
        nearest_token(query, keys, backend=backend)
    assert memory.extra_bytes is not None
    assert memory.extra_bytes <= 2 * keys.numel() * 4 + 2**25


def test_nearest_has_no_gradient(backend: str) -> None:
    query, keys = tokens(1, 9, 8).requires_grad_(), tokens(1, 5, 8).requires_grad_()
    assert not nearest_token(query, keys, backend=backend).requires_grad


def blended_case(
    n: int, num_bases: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Head-interleaved queries of two rows and heads, bases for all rows, a mask, a bias."""
    queries = [tokens(2, n, 2, width, seed=seed).to(dtype).transpose(1, 2) for seed in (0, 1)]
    keys = [tokens(1, 2, num_bases, width, seed=seed).to(dtype) for seed in (2, 3)]
    value = tokens(1, 2, num_bases, value_width, seed=4).to(dtype)
    mask = torch.linspace(-0.5, 1.5, 2 * n, device=DEVICE).clamp(0, 1).view(2, n)
    bias = tokens(2, num_bases, seed=5)
    bias[:, 1::3] = float("-inf")
    return queries[0], keys[0], queries[1], keys[1], value, mask, bias


@pytest.mark.parametrize(
    ("with_bias", "sizes"),
    [
        (True, (1, 1, 40, 24)),
        (False, (70, 256, 40, 40)),
        (True, (33, 300, 80, 80)),
        (True, (150, 16, 160, 24)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.interpreter
def test_blend(
    backend: str, dtype: torch.dtype, with_bias: bool, sizes: tuple[int, int, int, int]
) -> None:
    *inputs, bias = blended_case(*sizes, dtype)
    given = bias if with_bias else None
    double = [tensor.double() for tensor in inputs]
    exact = eager_blended_attention(*double, bias=given)
    plain = eager_blended_attention(*inputs, bias=given)
    found = blended_attention(*inputs, bias=given, backend=backend)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert found.transpose(1, 2).is_contiguous()
    error = max_error(found, exact)
    assert error <= parity_bound(exact, plain, ATTENTION_ATOL)
    if dtype == torch.float32:
        assert error <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.interpreter
def test_a_map_without_a_share_has_no_part(backend: str, dtype: torch.dtype) -> None:
    *inputs, mask, _ = blended_case(100, 60, 40, 40, dtype)
    query_target, key_target, query_source, key_source, value = inputs
    mask = (torch.arange(200, device=DEVICE) % 3 == 0).float().view(2, 100)
    mask[:, 40:80] = 0
    marked = mask.bool()[:, None, :, None]
    target = query_target.masked_fill(~marked, float("nan"))
    source = query_source.masked_fill(marked, float("inf"))
    found = blended_attention(
        target, key_target, source, key_source, value, mask, scale=0.2, backend=backend
    )
    clean = blended_attention(*inputs, mask, scale=0.2, backend=backend)
    assert bool(found.isfinite().all())
    assert torch.equal(found, clean)
    unmixed = eager_blended_attention(*(t.double() for t in (*inputs, mask)), scale=0.2)
    assert max_error(found, unmixed) <= 2 * ATTENTION_ATOL[dtype] * float(unmixed.abs().max())


@pytest.mark.interpreter
def test_a_blend_of_no_tokens(backend: str) -> None:
    *inputs, _ = blended_case(0, 5, 8, 6, torch.float32)
    assert blended_attention(*inputs, backend=backend).shape == (2, 2, 0, 6)


@pytest.mark.usefixtures("mapped_blocks")
def test_peak_memory_does_not_hold_the_maps(backend: str) -> None:
    query = tokens(1, 4, 32768, 40)
    bases, mask = tokens(1, 4, 256, 40, seed=1), torch.rand(1, 32768, device=DEVICE)
    inputs = (query, bases, query, bases, bases, mask)
    blended_attention(*inputs, backend=backend)
    with PeakMemory(DEVICE) as memory:
        blended_attention(*inputs, backend=backend)
    assert memory.extra_bytes is not None
    assert memory.extra_bytes <= 3 * query.numel() * 4 + 2**24  # a map has 2^27


def test_the_torch_backend_of_the_blend_has_gradients() -> None:
    *inputs, mask, bias = (t.double().cpu() for t in blended_case(4, 3, 3, 2, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *given: blended_attention(*given, mask, bias=bias),
        [tensor.detach().requires_grad_() for tensor in inputs],
    )


@pytest.mark.interpreter
def test_opcheck(backend: str) -> None:
    query, keys = tokens(2, 9, 8), tokens(2, 5, 8, seed=1)
    sample: tuple[torch.Tensor, ...] = (query, keys)
    *given, mask, bias = blended_case(9, 5, 8, 6, torch.float32)
    if backend == "cuda":
        import stem_kernels.cuda.blended_attention
        import stem_kernels.cuda.nearest_token

        nearest = torch.ops.stem_kernels_ext.nearest_token
        blended = torch.ops.stem_kernels_ext.blended_attention
        sample = (query.unsqueeze(1), keys.unsqueeze(1), inverse_norms(keys).unsqueeze(1))
        given[1::2] = [bases.expand(2, -1, -1, -1) for bases in given[1::2]]
        given[4], bias = given[4].expand(2, -1, -1, -1), bias.expand(2, -1, -1)
    else:
        import stem_kernels.reference.nearest_token

        if backend == "triton":
            import stem_kernels.triton.attention.blended
            import stem_kernels.triton.nearest.token  # noqa: F401

            bias = bias.unsqueeze(0)
        nearest = getattr(torch.ops.stem_kernels, f"nearest_token_{backend}")
        blended = getattr(torch.ops.stem_kernels, f"blended_attention_{backend}", None)
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(nearest, sample, test_utils=tests)
    if backend != "torch":  # where it is made of basis_attention, and is no operator of its own
        torch.library.opcheck(blended, (*given, mask, bias, 0.3), test_utils=tests)
        torch.library.opcheck(blended, (*given, mask, None, 0.3), test_utils=tests)


def test_the_new_operators_compile_to_one_graph(backend: str) -> None:
    *inputs, bias = blended_case(40, 30, 8, 8, torch.float32)
    compiled = torch.compile(blended_attention, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs, bias=bias, backend=backend)
    assert torch.equal(found, blended_attention(*inputs, bias=bias, backend=backend))
    query, keys = tokens(2, 40, 8), tokens(2, 30, 8, seed=1)
    nearest = torch.compile(nearest_token, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        nearest(query, keys, backend=backend), nearest_token(query, keys, backend=backend)
    )


Q = torch.zeros(2, 3, 10, 4)
K = torch.zeros(1, 3, 5, 4)
T = torch.zeros(2, 10, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nearest_token(T[0], T), ValueError, r"query must be \[B, n, d\], not \[10, 4\]"),
        (
            lambda: nearest_token(T, T[:1]),
            ValueError,
            r"keys must be \[2, m, 4\], not \[1, 10, 4\]",
        ),
        (lambda: nearest_token(T, T[:, :0]), ValueError, "m and d must be at least 1"),
        (lambda: nearest_token(T, T.half()), TypeError, "must have one dtype"),
        (lambda: nearest_token(T.int(), T), TypeError, "query is torch.int32; convert it"),
        (
            lambda: blended_attention(Q, K, Q[:, :, :9], K, K, Q[:, 0, :, 0]),
            ValueError,
            r"query_source must be the same, not \[2, 3, 9, 4\]",
        ),
        (
            lambda: blended_attention(Q, K, Q, K[..., :3], K, Q[:, 0, :, 0]),
            ValueError,
            "key_source must have d = 4, that of query_source",
        ),
        (
            lambda: blended_attention(Q, K[:, :, :4], Q, K, K, Q[:, 0, :, 0]),
            ValueError,
            r"key_target \[1, 3, 4, 4\] and value \[1, 3, 5, 4\] must agree on all",
        ),
        (
            lambda: blended_attention(Q, K, Q, K, K, Q[:, 0, :9, 0]),
            ValueError,
            r"mask is \[2, 9\]; it must be \[2, 10\]",
        ),
        (
            lambda: blended_attention(Q, K, Q, K, K, Q[:, 0, :, 0].bool()),
            TypeError,
            "mask is torch.bool; convert it",
        ),
        (
            lambda: blended_attention(Q, K, Q, K, K, Q[:, 0, :, 0], bias=K[0, :, :4, 0]),
            ValueError,
            r"bias is \[3, 4\]; it must be",
        ),
    ],
)
def test_errors_name_the_value_and_the_fix(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
