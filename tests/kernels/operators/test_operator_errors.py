"""What the operators say of arguments that do not fit, and the names of the package."""

from __future__ import annotations

import pytest
import torch

import stem_kernels
from stem_kernels import basis_attention, em_statistics, em_update, initial_bases, soft_em

X = torch.zeros(2, 10, 4)
M = torch.zeros(2, 3, 4)
Q = torch.zeros(2, 3, 10, 4)
KV = torch.zeros(1, 3, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: em_statistics(X[0], M), ValueError, r"features must be \[B, n, D\].*\[10, 4\]"),
        (
            lambda: em_statistics(X, M[:1]),
            ValueError,
            r"bases must be \[2, K, 4\], not \[1, 3, 4\]",
        ),
        (lambda: em_statistics(X, M[:, :0]), ValueError, "K and D must be at least 1"),
        (lambda: em_statistics(X, M, payload=X[:, :9]), ValueError, r"payload is \[2, 9, 4\]"),
        (lambda: em_statistics(X, M, payload=X.half()), TypeError, "must have one dtype"),
        (lambda: em_statistics(X.int(), M), TypeError, "features is torch.int32; convert it"),
        (lambda: em_statistics([1.0], M), TypeError, "features must be a torch.Tensor, not list"),
        (lambda: em_statistics(X, M, temperature=0), ValueError, "temperature is 0; it must be"),
        (lambda: em_statistics(X, M.to("meta")), ValueError, "must be on one device"),
        (
            lambda: soft_em(X, M, num_iters=0),
            ValueError,
            "num_iters is 0; it must be a whole number",
        ),
        (lambda: soft_em(X, M, empty="drop"), ValueError, 'empty is "drop"; it must be one of'),
        (lambda: soft_em(X[:, :0], M), ValueError, "there must be a token"),
        (
            lambda: em_update(M, M[..., 0], M[:1], num_tokens=9),
            ValueError,
            r"bases \[..., K, D\]; they are \[2, 3, 4\], \[2, 3\], \[1, 3, 4\]",
        ),
        (
            lambda: em_update(M.half(), M[..., 0].half(), M, num_tokens=9),
            TypeError,
            "sums is torch.float16, which many tokens overflow",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=9, payload_sums=M[:, :2]),
            ValueError,
            r"payload_sums is \[2, 2, 4\]",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=0),
            ValueError,
            "num_tokens is 0; it must be a whole number of at least 1",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=9, empty="reseed"),
            ValueError,
            "needs the argument candidates",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=9, empty="reseed", candidates=X[..., :3]),
            ValueError,
            r"candidates must be \[2, m, 4\] with m >= 1, not \[2, 10, 3\]",
        ),
        (lambda: initial_bases(X, 0), ValueError, "num_bases is 0; it must be a whole number"),
        (lambda: initial_bases(X[:, :0], 3), ValueError, "there must be a token"),
        (lambda: basis_attention(X, KV, KV), ValueError, r"query must be \[B, h, n, d\]"),
        (lambda: basis_attention(Q, KV[:, :2], KV), ValueError, r"key must be \[2 or 1, 3, K"),
        (lambda: basis_attention(Q, KV, KV[:, :, :4]), ValueError, "must agree on all but"),
        (lambda: basis_attention(Q, KV.half(), KV), TypeError, "must have one dtype"),
        (
            lambda: basis_attention(Q, KV, KV, bias=torch.zeros(3, 4)),
            ValueError,
            r"bias is \[3, 4\]; it must be \[h, K\] or \[B, h, K\] with B = 2 or 1",
        ),
        (
            lambda: initial_bases(X, 3, init="previous"),
            ValueError,
            'init is "previous"; it must be one of "gaussian", "tokens"',
        ),
    ],
)
def test_errors_name_the_value_and_the_fix(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_the_public_names() -> None:
    assert len(stem_kernels.__all__) <= 12
    for name in stem_kernels.__all__:
        assert getattr(stem_kernels, name).__doc__
