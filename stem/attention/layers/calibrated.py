"""What brings attention to a layer's bases nearer to that to all tokens of the video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stem_kernels.ops.calibration import (
    MOMENTS_STEP,
    MOMENTS_TOKENS,
    Calibration,
    calibrate_bases,
    moments,
)
from stem_kernels.ops.partial_attention import (
    PartialAttention,
    merged_attention,
    partial_attention,
)
from stem_kernels.ops.soft_em import SoftEM

from ...config import StemConfig
from .exchange import Lockstep, Tensors
from .projections import project_keys_and_values, project_queries
from .shared_em import of_spread_tokens, spread_over

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

Projected = tuple[torch.Tensor, torch.Tensor]


def calibration_of(
    attn: Attention,
    tokens: torch.Tensor,
    projected: Projected | None,
    bases: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    config: StemConfig,
    exchange: Lockstep | None,
) -> Calibration:
    """The calibration of each video's bases by its own tokens.

    Chunks meet twice: for the tokens that are queries, and to merge the exact attention of these
    to each chunk's tokens. Keys and values of a chunk are given up before it waits.

    Args:
        attn: Attention module, for its projections.
        tokens: Normalised input of the module, [videos, frames, S, C], of the running chunk.
        projected: Keys and values [videos, h, n, d] of these tokens where they are at hand.
        bases: Keys, values [videos, h, K, d] and bias [videos, 1 or h, K] or None of the bases.
        config: Configuration of the layer.
        exchange: Exchange in which the chunks meet; None: the tokens are those of whole videos.

    Returns:
        `Calibration`, the same for every chunk.
    """
    key, value, bias = bases
    features = tokens.flatten(1, 2)
    chosen = of_spread_tokens(features, config.num_queries, exchange, lambda tokens: tokens)
    query = project_queries(attn, chosen.unsqueeze(1))

    def merge(parts: list[Tensors]) -> Calibration:
        return calibrate_bases(
            query,
            merged_attention([PartialAttention(*part) for part in parts]).output,
            key,
            value,
            bias=bias,
            form=config.calibration,
        )

    part = _attended(attn, query, tokens, projected, config, exchange)
    return merge([part]) if exchange is None else exchange.meet(part, merge)


def _attended(
    attn: Attention,
    query: torch.Tensor,
    tokens: torch.Tensor,
    projected: Projected | None,
    config: StemConfig,
    exchange: Lockstep | None,
) -> PartialAttention:
    if config.key_share < 1:
        features = tokens.flatten(1, 2)
        total = features.shape[1] if exchange is None else tokens.shape[2] * exchange.num_frames
        own = spread_over(features, max(1, round(config.key_share * total)), exchange)
        if own.shape[1] == 0:  # of a small chunk
            return _to_nothing(query)
        tokens, projected = own.unsqueeze(1), None
    key, value = projected or project_keys_and_values(attn, tokens, tokens.shape[0])
    return partial_attention(query, key, value, backend=config.backend)


def _to_nothing(query: torch.Tensor) -> PartialAttention:
    """The attention of queries [videos, h, m, d] to no keys, for `merged_attention`."""
    zeros = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
    return PartialAttention(zeros, torch.full_like(zeros[..., 0], float("-inf")))


def moments_of(
    attn: Attention,
    features: torch.Tensor,
    found: SoftEM,
    bases: Projected,
    config: StemConfig,
    exchange: Lockstep | None,
    joint: bool,
) -> Calibration:
    """The covariance of keys and values that bases leave out, as a correction of each head.

    Args:
        attn: Attention module, for its projections.
        features: Tokens [videos, n, C] that EM read, of the running chunk where there is an
            exchange.
        found: Result of EM on the tokens or, in key space, on their keys.
        bases: Keys and values [videos, h, K, d] of the bases.
        config: Configuration of the layer.
        exchange: Exchange in which the chunks meet, once; None: the tokens are all that EM read.
        joint: Whether all videos have the responsibilities of the first.

    Returns:
        `Calibration` without values of its own, the same for every chunk.
    """

    def of_some(tokens: torch.Tensor) -> Calibration:
        query = project_queries(attn, tokens[:, ::MOMENTS_STEP].unsqueeze(1))
        key, value = project_keys_and_values(attn, tokens, tokens.shape[0])
        points = tokens if config.space == "feature" else key
        deciding = slice(0, 1) if joint else slice(None)
        return moments(
            query,
            points[deciding],
            key,
            value,
            found.bases[deciding],
            *bases,
            temperature=config.temperature,
            backend=config.backend,
        )

    return of_spread_tokens(features, MOMENTS_TOKENS, exchange, of_some, other=True)
