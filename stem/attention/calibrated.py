"""What brings attention to a layer's bases nearer to that to all tokens of the video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from stem_kernels.ops.calibration import Calibration, calibrate_bases, moments, token_products
from stem_kernels.ops.partial_attention import (
    PartialAttention,
    merged_attention,
    partial_attention,
)
from stem_kernels.ops.soft_em import SoftEM
from stem_kernels.shared.spread import spread_tokens

from ..config import StemConfig
from .exchange import Lockstep, Tensors, in_order
from .processor import project_keys_and_values, project_queries
from .shared_em import CPU, gathered_tokens, own_tokens

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
    if exchange is None:
        total = features.shape[1]
        index = spread_tokens(total, min(total, config.num_queries), features.device)
        chosen = features.index_select(1, index)
    else:
        total = tokens.shape[2] * exchange.num_frames
        index = spread_tokens(total, min(total, config.num_queries), CPU)
        chosen = gathered_tokens(exchange, features, index)
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
        index = spread_tokens(total, max(1, round(config.key_share * total)), CPU)
        own = index if exchange is None else own_tokens(exchange, index, tokens.shape[2])
        if len(own) == 0:  # of a small chunk
            return _to_nothing(query)
        tokens, projected = features.index_select(1, own.to(features.device)).unsqueeze(1), None
    key, value = projected or project_keys_and_values(attn, tokens, tokens.shape[0])
    return partial_attention(query, key, value, backend=config.backend)


def _to_nothing(query: torch.Tensor) -> PartialAttention:
    """The attention of queries [videos, h, m, d] to no keys, for `merged_attention`."""
    zeros = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
    return PartialAttention(zeros, torch.full_like(zeros[..., 0], float("-inf")))


def moments_of(
    attn: Attention,
    features: torch.Tensor,
    projected: Projected | None,
    found: SoftEM,
    bases: Projected,
    total: int,
    exchange: Lockstep | None,
) -> Calibration:
    """The covariance of keys and values that bases leave out, as a correction of each head.

    Args:
        attn: Attention module, for its projections.
        features: Tokens [videos, n, C] that EM read, of the running chunk where there is an
            exchange.
        projected: Keys and values [videos, h, n, d] of these tokens in key space, else None.
        found: Result of EM on the tokens or, in key space, on their keys.
        bases: Keys and values [videos, h, K, d] of the bases.
        total: Number of all tokens that EM read.
        exchange: Exchange in which the chunks meet, once; None: the tokens are all of them.

    Returns:
        `Calibration` without values of its own.
    """
    key, value = bases
    if projected is None and attn.norm_k is not None:  # keys are no linear map of the features
        projected = project_keys_and_values(attn, features, features.shape[0])
        found = SoftEM(key, None, found.mass.unsqueeze(1))
    products = token_products(*(projected or (features, features)), total)
    if exchange is not None:
        products = exchange.meet((products,), lambda parts: in_order(parts)[0])
    left_out = moments(products, found, found.bases if projected is None else value)
    if projected is None:
        left_out = _of_heads(attn, left_out.to(features.dtype)).to(left_out.dtype)
    correction = pad(left_out * left_out.shape[-2] ** -0.5, (0, 0, 0, 1))
    return Calibration(None, correction, torch.zeros_like(correction[..., :-1, 0]))


def _of_heads(attn: Attention, matrix: torch.Tensor) -> torch.Tensor:
    """W_k S W_v^T of each head, [videos, h, d, d], of a matrix S [videos, C, C] of features."""
    of_keys = _without_bias(attn.to_k, matrix).mT
    both = _without_bias(attn.to_v, of_keys).unflatten(-1, (attn.heads, -1))
    # [videos, h, d, h, d], of which each head has its own values
    return both.unflatten(1, (attn.heads, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _without_bias(project: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What a linear projection makes of rows [videos, m, C] but for its bias."""
    found: torch.Tensor = project(pad(rows, (0, 0, 0, 1)))
    return found[:, :-1] - found[:, -1:]
