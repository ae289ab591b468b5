"""What tests and benchmarks share: eager formulas, error bounds, tokens to try things on."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from .ops.calibration import MOMENTS_SHARE
from .ops.em_statistics import EMStatistics
from .ops.soft_em import SoftEM
from .shared.bases import directions_of, least_mass, m_step
from .shared.cosine import SMALLEST_NORM, cosine_loss
from .shared.parity import max_error, parity_bound

__all__ = [
    "clustered_tokens",
    "cosine_loss",
    "eager_basis_attention",
    "eager_blended_attention",
    "eager_calibrate_bases",
    "eager_em_statistics",
    "eager_moments",
    "eager_nearest_token",
    "eager_projected_attention",
    "eager_soft_em",
    "eager_video_attention",
    "eager_window_attention",
    "max_error",
    "parity_bound",
    "tokens_in_window",
]


def eager_em_statistics(
    features: torch.Tensor,
    bases: torch.Tensor,
    *,
    temperature: float = 0.01,
    normalize: bool = True,
    payload: torch.Tensor | None = None,
) -> EMStatistics:
    """`em_statistics` as one writes it first: responsibilities [..., n, K] held whole.

    Everything is in the features' dtype, so float64 gives the reference and float16 the error
    that plain half-precision torch makes.
    """
    directions = bases.to(features.dtype)
    if normalize:
        directions = directions / (directions.norm(dim=-1, keepdim=True) + 1e-4)
    responsibilities = torch.softmax(features @ directions.mT / temperature, dim=-1)
    return EMStatistics(
        responsibilities.mT @ features,
        responsibilities.sum(-2),
        None if payload is None else responsibilities.mT @ payload,
    )


def eager_soft_em(
    features: torch.Tensor, bases: torch.Tensor, *, num_iters: int = 5, temperature: float = 0.01
) -> torch.Tensor:
    """`soft_em(..., empty="zero")`, with responsibilities [..., n, K] held whole.

    They are divided by the bases' mass before the product with the tokens, as EM attention is
    often written; dividing after it, as `em_statistics` leaves it to do, holds one tensor less.
    Returns the bases [..., K, D] in the features' dtype.
    """
    for _ in range(num_iters):
        directions = bases / (bases.norm(dim=-1, keepdim=True) + 1e-4)
        responsibilities = torch.softmax(features @ directions.mT / temperature, dim=-1)
        weights = responsibilities / (responsibilities.sum(-2, keepdim=True) + 1e-4)
        bases = weights.mT @ features
    return bases


def eager_basis_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    query_mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """`basis_attention` as one writes it first: weights [B, h, n, K] held whole."""
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.to(logits.dtype).unsqueeze(-2)
    out = torch.softmax(logits, dim=-1) @ value
    if correction is None or query_mean is None:
        return out
    matrix, constant = correction.to(out.dtype).split([query.shape[-1], 1], dim=-2)
    return out + (query - query_mean.to(out.dtype).unsqueeze(-2)) @ matrix + constant


def eager_blended_attention(
    query_target: torch.Tensor,
    key_target: torch.Tensor,
    query_source: torch.Tensor,
    key_source: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`blended_attention` as one writes it first: two attentions, then a weighted sum."""
    share = mask[:, None, :, None].to(query_target.dtype)
    target = eager_basis_attention(query_target, key_target, value, scale=scale, bias=bias)
    source = eager_basis_attention(query_source, key_source, value, scale=scale, bias=bias)
    return share * target + (1 - share) * source


def eager_projected_attention(
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    *,
    query_bias: torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    query_mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """`projected_attention` as one writes it first: its steps, everything in one dtype."""
    query = linear(tokens, query_weight, query_bias).unflatten(-1, (key.shape[1], -1))
    query = query.transpose(1, 2)
    out = eager_basis_attention(
        query, key, value, bias=bias, correction=correction, query_mean=query_mean
    )
    return linear(out.transpose(1, 2).flatten(2), output_weight, output_bias)


def tokens_in_window(
    grid: tuple[int, int, int], window: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """bool [n, n]: whether a token of a video's grid is in the window of another."""
    _, y, x = torch.unravel_index(torch.arange(math.prod(grid), device=device), grid)
    return (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 <= (window + 0.5) ** 2


def eager_window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`window_attention` with all weights held; near, bool [n, n], says which tokens count."""
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~near, float("-inf"))
    return torch.softmax(logits, -1) @ value, logits.logsumexp(-1)


def eager_video_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    near: torch.Tensor,
    member: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    text_mask: torch.Tensor,
) -> torch.Tensor:
    """`video_attention` with the correction "moments", as its docstring says, all held.

    near, bool [n, n], says which tokens are in a token's window; member, bool [n, K], which base a
    token belongs to.
    """
    scale, whose, far = query.shape[-1] ** -0.5, member.to(query.dtype), (~near).to(query.dtype)
    base_key, base_value = (whose.mT @ part / whose.sum(0).unsqueeze(-1) for part in (key, value))
    rest = far @ whose  # [n, K]
    of_rest = torch.einsum("nm,mk,bhme->bhnke", far, whose, value)
    of_rest = of_rest / rest.clamp(min=1).unsqueeze(-1)
    logits = [(query @ part.mT) * scale for part in (key, base_key, text[0])]
    logits[0] = logits[0].masked_fill(~near, float("-inf"))
    logits[1] = logits[1] + rest.log()
    logits[2] = logits[2].masked_fill(~text_mask[:, None, None], float("-inf"))
    sizes = [part.shape[-1] for part in logits]
    exact, bases, texts = torch.softmax(torch.cat(logits, -1), -1).split(sizes, -1)
    out = exact @ value + torch.einsum("bhnk,bhnke->bhne", bases, of_rest) + texts @ text[1]
    of_keys, of_values = key - whose @ base_key, value - whose @ base_value
    spread = (query @ of_keys.mT * scale).square().mean((-1, -2), keepdim=True)
    matrix = of_keys.mT @ of_values * (scale / len(near)) / (1 + spread).sqrt()
    return out + bases.sum(-1, keepdim=True) * (query @ matrix)


def eager_nearest_token(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`nearest_token` as one writes it first: all products [B, n, m] held whole; int64 [B, n]."""
    norms = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    return (query @ (keys / norms.clamp(min=SMALLEST_NORM)).mT).argmax(-1)


def eager_calibrate_bases(
    query: torch.Tensor,
    attended: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor,
    form: str = "joint",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`calibrate_bases` as ridge regressions in their primal form: values and correction.

    The joint one is over K + d + 1 unknowns there, `calibrate_bases` solves for the m queries.
    """
    scale = query.shape[-1] ** -0.5
    weights = torch.softmax(query @ key.mT * scale + bias.to(query.dtype).unsqueeze(-2), dim=-1)
    centred = (query - query.mean(-2, keepdim=True)) * scale
    regressors = torch.cat([centred, torch.ones_like(query[..., :1])], dim=-1)
    residual = attended - weights @ value

    def ridge(unknowns: torch.Tensor, penalty: torch.Tensor | float) -> torch.Tensor:
        eye = torch.eye(unknowns.shape[-1], dtype=unknowns.dtype)
        return torch.linalg.solve(unknowns.mT @ unknowns + penalty * eye, unknowns.mT @ residual)

    if form == "linear":
        fitted = ridge(regressors, 1e-2 * regressors.square().sum(-2).mean(-1)[..., None, None])
    else:
        per_weight, per_query = (
            part.square().sum(-1).mean(-1)[..., None, None].rsqrt()
            for part in (weights, regressors)
        )
        per_query = per_query * 10**0.5
        both = ridge(torch.cat([per_weight * weights, per_query * regressors], dim=-1), 0.03)
        of_values, of_query = both.split([weights.shape[-1], regressors.shape[-1]], dim=-2)
        value, fitted = value + per_weight * of_values, per_query * of_query
    fitted = torch.cat([fitted[..., :-1, :] * scale, fitted[..., -1:, :]], dim=-2)
    return value.expand(*query.shape[:2], *value.shape[2:]), fitted


def eager_moments(
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
) -> torch.Tensor:
    """The correction [B, h, d + 1, e] of `moments` as one writes it first, all in one dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    directions = bases / (bases.norm(dim=-1, keepdim=True) + 1e-4)
    shares = torch.softmax(features @ directions.mT / temperature, dim=-1)
    shares = shares if shares.ndim == 4 else shares.unsqueeze(1)
    of_keys, of_values = key - shares @ base_key, value - shares @ base_value
    overshoot = (scale * (query @ of_keys.mT)).square().mean((-1, -2), keepdim=True)
    share = MOMENTS_SHARE / (1 + overshoot).sqrt()
    matrix = share * scale * (of_keys.mT / key.shape[-2] @ of_values)
    return torch.cat([matrix, torch.zeros_like(matrix[..., :1, :])], dim=-2)


def clustered_tokens(
    shape: tuple[int, ...], *, num_clusters: int = 16, spread: float = 0.3, seed: int = 0
) -> torch.Tensor:
    """float32 tokens [..., n, D] around `num_clusters` centres, as attention features are."""
    generator = torch.Generator().manual_seed(seed)
    shape_of_centres = (*shape[:-2], num_clusters, shape[-1])
    centres = torch.randn(shape_of_centres, generator=generator, dtype=torch.float32)
    which = torch.randint(num_clusters, (shape[-2],), generator=generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return centres.index_select(-2, which) + spread * noise


def rounded_soft_em(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor,
    *,
    num_iters: int,
    temperature: float,
    empty: str,
) -> SoftEM:
    """`soft_em` in float64, but for what every kernel rounds to the features' dtype.

    That are the directions and the responsibilities that sums are made with. How far it is from
    `soft_em` in float64 is what rounding explains of the error of several iterations.

    Args:
        features: Tokens [..., n, D].
        bases: Bases [..., K, D].
        payload: Values [..., n, E].
        num_iters: Number of iterations.
        temperature: Temperature.
        empty: Policy, "zero" or "mask".
    """
    tokens, values, found = features.double(), payload.double(), bases.double()
    least = least_mass(features.shape[-2], bases.shape[-2])
    for _ in range(num_iters):
        directions = directions_of(found, normalize=True).to(features.dtype).double()
        shares = torch.softmax(tokens @ directions.mT / temperature, dim=-1)
        rounded = shares.to(features.dtype).double().mT
        found, of_values, mass = m_step(
            rounded @ tokens, shares.sum(-2), rounded @ values, found, least, empty, None
        )
    return SoftEM(found, of_values, mass)
