"""Wan: the text has an attention of its own, which stays; queries are normed before the heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import Grid, Operands, Projected, Rotary, VideoFamily, project_out, split_heads, turned


def _grid(config: Any, call: Mapping[str, Any]) -> Grid:
    sizes, patch = call["hidden_states"].shape[2:], config.patch_size
    return sizes[0] // patch[0], sizes[1] // patch[1], sizes[2] // patch[2]


def _project(
    attn: Any, hidden: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None
) -> Operands:
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
    query, key = attn.norm_q(query), attn.norm_k(key)
    query, key, value = (split_heads(part, attn.heads) for part in (query, key, value))
    if rotary is not None:
        # [1, n, 1, d], each angle twice
        cosines, sines = rotary[0][..., 0::2].transpose(1, 2), rotary[1][..., 1::2].transpose(1, 2)
        query, key = turned(query, cosines, sines), turned(key, cosines, sines)
    return Projected(query, key, value), None


def _output(attn: Any, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    return project_out(attn, video)


WAN = VideoFamily(
    "WanTransformer3DModel",
    blocks=("blocks",),
    attention="attn1",
    arguments=("hidden_states", "timestep"),
    grid=_grid,
    project=_project,
    output=_output,
)
