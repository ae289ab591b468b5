"""Corrections of attention to bases, fitted to the exact attention of a few queries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from ..shared.outputs import compute_dtype
from .basis_attention import check_bases, fitting_bias
from .checks import check_choice, check_floating
from .soft_em import SoftEM

OP = "calibrate_bases"

CALIBRATIONS = ("linear", "joint")

LINEAR_RIDGE = 1e-2
JOINT_RIDGE = 0.03
QUERY_WEIGHT = 10.0
"""Weight of the term that is linear in the query beside the weights of the bases."""


class Calibration(NamedTuple):
    """Values [B, h, K, e], or None for those of the bases, correction [B, h, d + 1, e] and mean
    query [B, h, d]; float32 or float64. The last two are what `basis_attention` takes."""

    value: torch.Tensor | None
    correction: torch.Tensor
    query_mean: torch.Tensor

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Calibration:
        """The same with a function of each of the tensors."""
        value = None if self.value is None else function(self.value)
        return Calibration(value, function(self.correction), function(self.query_mean))


def calibrate_bases(
    query: torch.Tensor,
    attended: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    form: str = "joint",
) -> Calibration:
    r"""What to add to attention to bases, so that a few queries come out as by exact attention.

    A base stands for many tokens, and the attention to it misses how their values go with their
    keys: to first order in the query, a matrix per head. With the queries' weights
    $P = \mathrm{softmax}(\text{scale}\, q c^T + b)$ of m queries, their residual $R = O - P v$ and
    $D = [\text{scale}\,(q - \bar q), 1]$:

    - "linear": ridge regression $E = (D^T D + 10^{-2} s I)^{-1} D^T R$, s the mean diagonal of
      $D^T D$; $v' = v$. One (d + 1) x (d + 1) system a head.
    - "joint": values too. $A = P P^T / p + 10\, D D^T / s + 0.03\, I$, p and s the mean diagonals
      of $P P^T$ and $D D^T$; $\alpha = A^{-1} R$; $v' = v + P^T \alpha / p$ and
      $E = 10\, D^T \alpha / s$. One m x m system a head.

    Then `basis_attention(..., value', correction=E, query_mean=mean)` is near exact attention.
    The scale is folded into the correction returned, which is for queries as given.

    Args:
        query: Queries [B, h, m, d], m >= 1, spread over those to be served; of any floating dtype,
            as all tensors here.
        attended: Exact attention [B, h, m, e] of these queries to all tokens that the bases
            stand for (see `partial_attention`).
        key: Keys [B or 1, h, K, d] of the bases.
        value: Values [B or 1, h, K, e] of the bases.
        scale: Factor of the logits; 1 / sqrt(d) if None.
        bias: Bias of the logits, as `basis_attention` takes it, or None.
        form: Form of the correction, "linear" or "joint".

    Returns:
        `Calibration`, in float32 (float64 where the queries are float64). The mean query is that
        of the m queries. Solved by Cholesky; nothing waits for the device.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.

    Source: this package's.
    """
    check_floating(OP, query=query, attended=attended, key=key, value=value, bias=bias)
    check_bases(OP, query, key, value)
    check_choice(OP, "form", form, CALIBRATIONS)
    batch, heads, count, dim = query.shape
    expected = (batch, heads, count, value.shape[-1])
    if attended.shape != expected:
        raise ValueError(f"{OP}: attended is {list(attended.shape)}; it must be {list(expected)}")
    if count == 0:
        raise ValueError(f"{OP}: query is {list(query.shape)}; there must be a query")
    bias = fitting_bias(OP, bias, query, key.shape[-2])
    scale = dim**-0.5 if scale is None else float(scale)
    compute = compute_dtype(query)
    with torch.autocast(query.device.type, enabled=False):
        query, attended, key, value = (
            tensor.to(compute) for tensor in (query, attended, key, value)
        )
        logits = query @ key.mT * scale
        if bias is not None:
            logits = logits + bias.to(compute).unsqueeze(-2)
        # [B, h, m, K] and [B, h, m, e]
        weights = torch.softmax(logits, dim=-1)
        residual = attended - weights @ value
        mean = query.mean(-2, keepdim=True)
        # [B, h, m, d + 1]
        regressors = torch.cat([(query - mean) * scale, torch.ones_like(query[..., :1])], dim=-1)
        if form == "linear":
            moments = regressors.mT @ regressors
            fitted = _solve(
                _ridged(moments, LINEAR_RIDGE * _mean_diagonal(moments)), regressors.mT @ residual
            )
            # Never the caller's own memory: results of both forms can be kept and changed alike.
            value = value.expand(*expected[:2], *value.shape[2:]).clone()
        else:
            of_weights, of_queries = weights @ weights.mT, regressors @ regressors.mT
            per_weight = _mean_diagonal(of_weights).reciprocal()
            per_query = QUERY_WEIGHT * _mean_diagonal(of_queries).reciprocal()
            gram = per_weight * of_weights + per_query * of_queries
            share = _solve(_ridged(gram, JOINT_RIDGE), residual)
            fitted = per_query * (regressors.mT @ share)
            value = value + per_weight * (weights.mT @ share)
        correction = torch.cat([fitted[..., :-1, :] * scale, fitted[..., -1:, :]], dim=-2)
    return Calibration(value, correction, mean.squeeze(-2))


def token_products(features: torch.Tensor, payload: torch.Tensor, total: int) -> torch.Tensor:
    r"""$X^T P / n$, the first term of `moments`, of all tokens or of a part of them.

    Args:
        features: Tokens [..., m, D] of any floating dtype.
        payload: Payload [..., m, E] of the same tokens and dtype.
        total: Number n of all tokens; the terms of their parts add up.

    Returns:
        [..., D, E] in float32 (float64 for float64).
    """
    compute = compute_dtype(features)
    with _without_autocast(features.device):
        # Nearly all of it is subtracted again: rounded to half, little of what is left were right.
        return (features.to(compute).mT / total) @ payload.to(compute)


def moments(products: torch.Tensor, found: SoftEM, payload_bases: torch.Tensor) -> torch.Tensor:
    r"""How features and payloads of tokens go together within the bases, in the mean.

    $$S = \frac{1}{n} \sum_n x_n^T p_n - \sum_k \frac{M_k}{\sum_j M_j} m_k^T v_k$$

    Attention to a base takes its tokens for one. To first order in the query it misses
    $\text{scale}\, q S$, with keys for features and values for payloads: one matrix a head, for
    which no query is needed. As the correction of `basis_attention` it is
    $[\text{scale}\, S; 0]$, with 0 for the mean query.

    Args:
        products: Products [..., D, E] of all tokens that EM read, from `token_products`.
        found: Result of EM, bases [..., K, D] and mass [..., K].
        payload_bases: Payload bases [..., K, E] under the same responsibilities; the bases
            themselves where both are projected later.

    Returns:
        [..., D, E] in the products' dtype.

    Source: this package's.
    """
    shares = found.mass / found.mass.sum(-1, keepdim=True)
    with _without_autocast(products.device):
        weighed = found.bases.to(products.dtype) * shares.to(products.dtype).unsqueeze(-1)
        return products - weighed.mT @ payload_bases.to(products.dtype)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Tensors without data, such as kernels are counted with, know no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _mean_diagonal(matrices: torch.Tensor) -> torch.Tensor:
    """[..., 1, 1]"""
    return matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _ridged(matrices: torch.Tensor, ridge: torch.Tensor | float) -> torch.Tensor:
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return matrices + ridge * eye


def _solve(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The ridge keeps the matrices positive, so there is no error to wait for the device for."""
    factor, _ = torch.linalg.cholesky_ex(matrices, check_errors=False)
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
