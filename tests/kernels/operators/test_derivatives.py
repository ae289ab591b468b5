"""Derivatives forward: right through torch's backend, an error through the others, never zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from stem_kernels import (
    BackendError,
    attention_bias,
    basis_attention,
    blended_attention,
    em_statistics,
    em_update,
    nearest_token,
    soft_em,
    stem_attention,
)
from stem_kernels.ops.calibration import moments
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.ops.projected_attention import projected_attention
from stem_kernels.testing import clustered_tokens

pytestmark = pytest.mark.interpreter

Q = clustered_tokens((1, 2, 40, 8)).double()
K = clustered_tokens((1, 2, 6, 8), seed=1).double()
V = clustered_tokens((1, 2, 6, 5), seed=2).double()
MASK = torch.linspace(0, 1, 40).double().unsqueeze(0)
CORRECTION, MEAN = torch.ones(1, 2, 9, 5).double(), torch.zeros(1, 2, 8).double()
TO_QUERY = clustered_tokens((16, 8), seed=3).double()
TO_OUTPUT = clustered_tokens((6, 10), seed=4).double()
NUM = 40
Function = Callable[[torch.Tensor, str], torch.Tensor]


def typed(x: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    return [other.to(x.dtype) for other in others]


def update(x: torch.Tensor, on: str) -> torch.Tensor:
    (bases,) = typed(x, K)
    mass = 1 + x[:, :, :6, 0].square()
    return em_update(x[:, :, :6], mass, bases, num_tokens=NUM, backend=on).bases


FUNCTIONS: dict[str, Function] = {
    "query": lambda x, on: basis_attention(x, *typed(x, K, V), backend=on),
    "key": lambda x, on: basis_attention(*typed(x, Q), x, x, backend=on),
    "bias": lambda x, on: basis_attention(
        *typed(x, Q, K, V), bias=x[:, :, :6, 0], backend=on
    ),
    "corrected": lambda x, on: basis_attention(
        x, *typed(x, K, V), correction=CORRECTION.to(x.dtype), query_mean=MEAN.to(x.dtype),
        backend=on,
    ),
    "blended": lambda x, on: blended_attention(
        x, *typed(x, K, Q, K, V, MASK), backend=on
    ),
    "projected": lambda x, on: projected_attention(
        x[0], *typed(x, TO_QUERY, K, V, TO_OUTPUT), backend=on
    ),
    "em_statistics": lambda x, on: em_statistics(
        x, *typed(x, K), temperature=1.0, payload=x, backend=on
    ).payload_sums,
    "em_update": update,
    "soft_em": lambda x, on: soft_em(x, 6, num_iters=2, temperature=1.0, backend=on).bases,
    "partial_attention": lambda x, on: partial_attention(
        x[:, :, :9], x, x, backend=on
    ).output,
    "moments": lambda x, on: moments(
        x[:, :, :9], x, x, x, x[:, :, :6], x[:, :, 6:12], x[:, :, 12:18], temperature=1.0,
        backend=on,
    ).correction,
    "moments of bases": lambda x, on: moments(
        *typed(x, Q[:, :, :9], Q, Q, Q[..., :5]), x[:, :, :6], *typed(x, K, V), temperature=1.0,
        backend=on,
    ).correction,
    "stem_attention": lambda x, on: stem_attention(
        x, x, x, num_bases=6, temperature=1.0, calibration="joint", allow_exact=False, backend=on
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_torch_are_right(name: str) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](x, "torch")

    along = clustered_tokens(tuple(Q.shape), seed=9).double()
    step = 1e-6 * along
    expected = (run(Q + step) - run(Q - step)) / 2e-6
    size = float(expected.norm())
    assert size > 1e-3
    value, found = jvp(run, (Q,), (along,))
    assert torch.allclose(value, run(Q), rtol=1e-12, atol=1e-12)
    assert float((found - expected).norm()) <= 1e-6 * size
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(Q, along))
        assert float((forward_ad.unpack_dual(dual).tangent - expected).norm()) <= 1e-6 * size
    both = torch.stack([along, 2 * along])
    many = vmap(lambda tangent: jvp(run, (Q,), (tangent,))[1])(both)
    assert float((many - torch.stack([expected, 2 * expected])).norm()) <= 1e-5 * size


def test_derivatives_where_a_base_is_empty() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        bases = torch.cat([x[:, :, :5], -x.detach()[:, :, :1]], -2)
        found = soft_em(x, bases, num_iters=1, temperature=0.01, payload=x, backend="torch")
        assert (found.mass[..., -1] == 0).all()
        bias = attention_bias(found.mass, proportional=True)
        return basis_attention(x, found.bases, found.payload, bias=bias, backend="torch")

    features = 1 + Q.abs()  # none of them lies where the last base does
    along = clustered_tokens(tuple(Q.shape), seed=9).double()
    expected = (run(features + 1e-6 * along) - run(features - 1e-6 * along)) / 2e-6
    _, found = jvp(run, (features,), (along,))
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def test_what_transforms_hide_is_not_lost() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS["query"](x, "auto")

    along = torch.ones_like(Q)
    _, expected = jvp(run, (Q,), (along,))
    # The tangent is of the outer transform, and the inner one sees none.
    _, outer = jvp(lambda x: jvp(lambda y: run(x) * y.sum(), (Q,), (along,))[0], (Q,), (along,))
    torch.testing.assert_close(outer, expected * Q.sum())
    _, inside = jvp(lambda x: vmap(run)(x.unsqueeze(0))[0], (Q,), (along,))
    torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_others_are_an_error(name: str, backend: str) -> None:
    if backend == "torch":
        pytest.skip("derivatives pass through it")
    x = Q.float()

    def run(x: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](x, backend)

    run(x)
    with pytest.raises(BackendError, match="carry or carries tangents of forward-mode"):
        jvp(run, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(BackendError, match="tangents"):
        run(forward_ad.make_dual(x, x))
    with pytest.raises(BackendError, match="tangents"):
        vmap(lambda tangent: jvp(run, (x,), (tangent,))[1])(torch.stack([x, x]))
    with pytest.raises(BackendError, match="it has no backward pass"):
        run(x.clone().requires_grad_())


def test_numbers_of_keys_have_no_derivatives() -> None:
    with forward_ad.dual_level():
        found = nearest_token(forward_ad.make_dual(Q[0], Q[0]), K[0], backend="torch")
        assert torch.equal(found, nearest_token(Q[0], K[0], backend="torch"))
