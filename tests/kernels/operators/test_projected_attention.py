"""`projected_attention`: against float64, strides, bits, NaN, derivatives, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, tokens
from torch.autograd import gradcheck

from stem_kernels import BackendError, cuda
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.ops.projected_attention import is_fused, projected_attention
from stem_kernels.shared import forms
from stem_kernels.testing import eager_projected_attention, max_error, parity_bound

pytestmark = pytest.mark.usefixtures("poisoned_memory")

fused = pytest.mark.skipif(
    DEVICE != "cpu" or cuda.load_error("cpu") is not None,
    reason="one kernel of it is only in the extension's CPU part",
)
WITH = {
    "nothing": (),
    "biases": ("query_bias", "output_bias", "bias"),
    "correction": ("correction", "query_mean"),
}
SIZES = {
    "one of each": (1, 1, 1, 1, 1, 1, 1, 1),
    "ragged": (2, 70, 50, 3, 16, 24, 37, 33),
    "wide": (1, 161, 700, 2, 40, 40, 330, 256),
    "several tasks": (2, 600, 48, 1, 48, 8, 48, 20),
}
"""B, n, C, h, d, e, E, K."""


def drawn(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], Any]:
    """Tensors in their order, and all that may be given beside them."""
    batch, n, channels, heads, width, value_width, outputs, num_bases = sizes
    inner, attended = heads * width, heads * value_width
    given = (
        tokens(batch, n, channels),
        tokens(inner, channels, seed=1) * channels**-0.5,
        tokens(1, heads, num_bases, width, seed=2),
        tokens(batch, heads, num_bases, value_width, seed=3),
        tokens(outputs, attended, seed=4) * attended**-0.5,
    )
    bias = tokens(heads, num_bases, seed=5)
    bias[:, 1::3] = float("-inf")
    more = {
        "query_bias": tokens(1, inner, seed=6)[0].to(dtype),
        "output_bias": tokens(1, outputs, seed=7)[0].to(dtype),
        "bias": bias,
        "correction": 0.1 * tokens(1, heads, width + 1, value_width, seed=8),
        "query_mean": tokens(batch, heads, width, seed=9),
    }
    return tuple(part.to(dtype) for part in given), more


@pytest.mark.interpreter
@pytest.mark.thinned
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("names", WITH.values(), ids=WITH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parity(
    backend: str, dtype: torch.dtype, names: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    given, more = drawn(sizes, dtype)
    more = {name: more[name] for name in names}
    found = projected_attention(*given, **more, backend=backend)
    assert found.dtype == dtype
    assert found.shape == (*sizes[:2], sizes[6])
    exact, same = (
        eager_projected_attention(
            *(part.to(of) for part in given), **{name: part.to(of) for name, part in more.items()}
        )
        for of in (torch.float64, dtype)
    )
    assert max_error(found, exact) <= parity_bound(exact, same, ROUNDING_ATOL)


def test_strides_and_no_tokens(backend: str) -> None:
    given, more = drawn(SIZES["ragged"], torch.float32)
    right = projected_attention(*given, **more, backend=backend)
    x, to_query, key, value, to_output = given
    spread = x.mT.contiguous().mT, to_query.mT.contiguous().mT
    found = projected_attention(*spread, key, value, to_output, **more, backend=backend)
    assert max_error(found, right) <= 1e-5
    halves = torch.stack([x, x], 2)[:, :, 1]
    found = projected_attention(halves, to_query, key, value, to_output, **more, backend=backend)
    assert torch.equal(found, right)
    level = torch.full_like(more["bias"], 0.5)
    for bias in (more["bias"].mT.contiguous().mT, level[:, :1].expand_as(level)):
        strided, copied = ({**more, "bias": each} for each in (bias, bias.clone()))
        found = projected_attention(*given, **strided, backend=backend)
        assert torch.equal(found, projected_attention(*given, **copied, backend=backend))
    none = projected_attention(x[:, :0], to_query, key, value, to_output, backend=backend)
    assert none.shape == (2, 0, 37)
    empty = (x, to_query, key, value[..., :0], to_output[:, :0])
    assert not projected_attention(*empty, backend=backend).any()
    added = more["output_bias"]
    found = projected_attention(*empty, output_bias=added, backend=backend)
    assert torch.equal(found, added.expand(2, 70, 37))


@fused
def test_a_token_has_the_same_bits_among_any_others() -> None:
    given, more = drawn(SIZES["several tasks"], torch.float32)
    whole = projected_attention(*given, **more, backend="cuda")
    for part in (slice(0, 1), slice(5, 38), slice(100, 600)):
        found = projected_attention(given[0][:, part], *given[1:], **more, backend="cuda")
        assert torch.equal(found, whole[:, part])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(projected_attention(*given, **more, backend="cuda"), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_token_that_is_no_number_stays_alone(backend: str) -> None:
    given, more = drawn(SIZES["ragged"], torch.float32)
    right = projected_attention(*given, **more, backend=backend)
    given[0][1, 7] = float("nan")
    found = projected_attention(*given, **more, backend=backend)
    assert found[1, 7].isnan().all()
    found[1, 7] = right[1, 7]
    assert max_error(found, right) <= 1e-5


def test_gradients_pass_through_torch() -> None:
    given, more = drawn((1, 5, 4, 2, 3, 2, 4, 3), torch.float64)
    more["bias"] = tokens(2, 3, seed=5)
    parts = [part.double().requires_grad_() for part in (*given, *more.values())]

    def call(*parts: torch.Tensor) -> torch.Tensor:
        return projected_attention(*parts[:5], **dict(zip(more, parts[5:], strict=True)))

    assert gradcheck(call, parts)
    if cuda.load_error("cpu") is None and DEVICE == "cpu":
        single = [part.detach().float().requires_grad_() for part in parts[:5]]
        with pytest.raises(BackendError, match=r"tokens, .* require.* grad"):
            projected_attention(*single, backend="cuda")


def test_autocast_leaves_it_alone(backend: str) -> None:
    given, more = drawn(SIZES["ragged"], torch.float32)
    right = projected_attention(*given, **more, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(projected_attention(*given, **more, backend=backend), right)


@fused
def test_it_says_where_it_is_one_kernel() -> None:
    given, _ = drawn(SIZES["ragged"], torch.float32)
    assert is_fused(*given, backend="cuda")
    assert not is_fused(*given, backend="torch")
    assert not is_fused(*(part.double() for part in given))
    assert not is_fused(*(part.to("meta") for part in given))
    assert not is_fused(*given, output_bias=torch.zeros(37, requires_grad=True), backend="cuda")
    forms.pass_over("projected_attention", "cuda")
    try:
        assert not is_fused(*given, backend="cuda")
    finally:
        forms.forget()


X, W, KV = torch.zeros(2, 7, 6), torch.zeros(8, 6), torch.zeros(1, 2, 3, 4)
OUT = torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: projected_attention(X[0], W, KV, KV, OUT), ValueError, r"tokens must be \[B, n"),
        (lambda: projected_attention(X, W[:7], KV, KV, OUT), ValueError, r"query_weight \[7, 6\]"),
        (lambda: projected_attention(X, W, KV[:, :, :2], KV, OUT), ValueError, r"2, 2, 4\], value"),
        (lambda: projected_attention(X, W, KV, KV, OUT.mT), ValueError, r"\[8, 5\]$"),
        (
            lambda: projected_attention(X, W, KV, KV, OUT, query_bias=W[:7, 0]),
            ValueError,
            r"query_bias \[7\]",
        ),
        (lambda: projected_attention(X, W.half(), KV, KV, OUT), TypeError, "must have one dtype"),
        (
            lambda: projected_attention(X, W, KV, KV, OUT, bias=torch.zeros(3, 3)),
            ValueError,
            r"bias is \[3, 3\]; it must be \[h, K\]",
        ),
        (
            lambda: projected_attention(X, W, KV, KV, OUT, correction=torch.zeros(1, 2, 5, 4)),
            ValueError,
            "projected_attention: query_mean is None; correction and query_mean go together",
        ),
        (
            lambda: projected_attention(
                X, W, KV, KV, OUT, correction=torch.zeros(1, 2, 4, 4), query_mean=KV[:, :, 0]
            ),
            ValueError,
            r"correction is \[1, 2, 4, 4\]; it must be \[2 or 1, 2, 5, 4\]",
        ),
    ],
)
def test_what_does_not_fit(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
