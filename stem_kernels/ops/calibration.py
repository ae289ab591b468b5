"""Corrections of attention to bases, fitted to the exact attention of a few queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from ..reference.moments import moments_torch
from ..shared.outputs import compute_dtype
from ..verification import calibration, run
from ..verification.comparison import Comparison
from .basis_attention import check_bases, fitting_bias
from .checks import check_choice, check_floating, check_positive

OP = "calibrate_bases"
MOMENTS_OP = "moments"

CALIBRATIONS = ("linear", "joint")

LINEAR_RIDGE = 1e-2
JOINT_RIDGE = 0.03
MOMENTS_SHARE = 0.85
MOMENTS_TOKENS = 512
"""Tokens from which `moments` is estimated, others than EM starts from, which lie nearer to their
bases than tokens do: from more it is hardly nearer, from a few it is noise."""
MOMENTS_KEYS = 1024
"""The same of `stem_attention`, whose keys and values are there: nothing is projected for them."""
MOMENTS_STEP = 4
"""Of these tokens every fourth has its query taken."""
MOMENTS_ATOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Part of the parity bound of `moments`, relative to the largest |reference|."""
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


def moments(
    query: torch.Tensor,
    features: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bases: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
    *,
    temperature: float,
    scale: float | None = None,
    backend: str = "auto",
) -> Calibration:
    r"""How keys and values go together within the bases: a correction that no attention is for.

    Attention to a base takes its tokens for one. To first order in the query it misses
    $\text{scale}\, q S$ with one matrix a head, the covariance that bases leave out. It is
    estimated from m of the tokens, with their responsibilities
    $z = \mathrm{softmax}(x \hat m^T / \tau)$ as EM has them:

    $$\delta = k - z c, \quad S = \frac{0.85}{\sqrt{1 + s^2}} \cdot \frac{1}{m} \sum_n \delta_n^T
    (v_n - z_n v), \quad s^2 = \overline{(\text{scale}\, q\, \delta)^2}$$

    The wider a head's logits spread within its bases, by s in the mean over queries and tokens, the
    more the first order overshoots; the factor is measured (benchmarks/studies/calibration).

    Args:
        query: Queries [B, h, r, d], r >= 1, some of those to be served; of any floating dtype, as
            all tensors here, each of which may have a batch of 1.
        features: Tokens [B, (h,) m, D] that EM read, or some of them, m >= 1; with heads where EM
            has bases for each.
        key: Keys [B, h, m, d] of these tokens.
        value: Values [B, h, m, e] of these tokens.
        bases: Bases [B, (h,) K, D] that EM found.
        base_key: Keys [B, h, K, d] of the bases.
        base_value: Values [B, h, K, e] of the bases.
        temperature: Temperature tau > 0 of the responsibilities.
        scale: Factor of the attention's logits; 1 / sqrt(d) if None.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch". The extension has no
            kernel of it, so with "cuda" torch computes it; so it does with "triton" for float32 on
            a GPU, more than 256 bases, and keys or values of more than 160 channels.

    Returns:
        `Calibration` in float32 (float64 for float64): no values, the correction [scale S; 0] and
        0 for the mean query.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: this package's.
    """
    asked = {
        "query": query, "features": features, "key": key, "value": value, "bases": bases,
        "base_key": base_key, "base_value": base_value,
    }  # fmt: skip
    _check_moments(asked)
    check_positive(MOMENTS_OP, "temperature", temperature)
    scale = key.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (query, features, key, value, bases, base_key, base_value)
    numbers = (float(temperature), scale, MOMENTS_SHARE)

    def on(chosen: str) -> Calibration:
        if chosen == "triton":
            from ..triton.em.moments import moments_triton, serves

            if serves(*tensors):
                return Calibration(None, *moments_triton(*tensors, *numbers))
        return Calibration(None, *moments_torch(*tensors, *numbers))

    def check(found: Calibration, _: str) -> list[Comparison] | None:
        return calibration.moments(found[1:], *tensors, *numbers, MOMENTS_ATOL)

    return run(MOMENTS_OP, backend, asked, bases.shape[-2], on, check)


def _check_moments(tensors: Mapping[str, torch.Tensor]) -> None:
    check_floating(MOMENTS_OP, **tensors)
    query, features, key, value, bases, _, _ = tensors.values()
    fits = query.ndim == key.ndim == value.ndim == 4 and 3 <= features.ndim == bases.ndim <= 4
    if fits:
        heads, m, dim = key.shape[1:]
        (num_bases, channels), width = bases.shape[-2:], value.shape[-1]
        of_heads = (heads,) if features.ndim == 4 else ()
        expected = (
            (heads, query.shape[2], dim), (*of_heads, m, channels), (heads, m, dim),
            (heads, m, width), (*of_heads, num_bases, channels), (heads, num_bases, dim),
            (heads, num_bases, width),
        )  # fmt: skip
        batches = (1, max(query.shape[0], key.shape[0]))
        fits = min(m, query.shape[2], num_bases) >= 1 and all(
            tensor.shape[0] in batches and tensor.shape[1:] == shape
            for tensor, shape in zip(tensors.values(), expected, strict=True)
        )
    if not fits:
        shapes = (f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(
            f"{MOMENTS_OP}: query must be [B, h, r, d], features [B, (h,) m, D], key [B, h, m, d], "
            "value [B, h, m, e], bases [B, (h,) K, D], base_key [B, h, K, d] and base_value "
            "[B, h, K, e], each batch B or 1, and r, m and K at least 1; they are "
            f"{', '.join(shapes)}"
        )


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
