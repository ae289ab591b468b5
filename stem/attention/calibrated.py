"""Calibration of a layer's bases by the exact attention of a few tokens of the whole video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stem_kernels.ops.calibration import Calibration, calibrate_bases
from stem_kernels.ops.partial_attention import (
    PartialAttention,
    merged_attention,
    partial_attention,
)
from stem_kernels.shared.spread import spread_tokens

from ..config import StemConfig
from .exchange import Lockstep, Tensors
from .processor import project_keys_and_values, project_queries
from .shared_em import CPU, gathered_tokens

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

    part = _attended(attn, query, tokens, projected, config.backend)
    return merge([part]) if exchange is None else exchange.meet(part, merge)


def _attended(
    attn: Attention,
    query: torch.Tensor,
    tokens: torch.Tensor,
    projected: Projected | None,
    backend: str,
) -> PartialAttention:
    key, value = projected or project_keys_and_values(attn, tokens, tokens.shape[0])
    return partial_attention(query, key, value, backend=backend)
