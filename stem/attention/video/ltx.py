"""LTX: the sample is a sequence of tokens; the rotary embedding comes before the heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import Grid, Operands, Projected, Rotary, VideoFamily, project_out, split_heads, turned

_SIZES = ("num_frames", "height", "width")


def _grid(config: Any, call: Mapping[str, Any]) -> Grid:
    if any(call.get(name) is None for name in _SIZES):
        given = {name: call.get(name) for name in _SIZES}
        raise ValueError(
            f"this call gives {given}; LTXVideoTransformer3DModel takes its tokens in one "
            "sequence, so pass the video's sizes in tokens"
        )
    return int(call["num_frames"]), int(call["height"]), int(call["width"])


def _project(
    attn: Any, hidden: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None
) -> Operands:
    query, key = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden))
    if rotary is not None:
        cosines, sines = rotary[0][..., 0::2], rotary[1][..., 0::2]  # [B, n, C], each angle twice
        query, key = turned(query, cosines, sines), turned(key, cosines, sines)
    of_video = (split_heads(part, attn.heads) for part in (query, key, attn.to_v(hidden)))
    return Projected(*of_video), None


def _output(attn: Any, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    return project_out(attn, video)


LTX = VideoFamily(
    "LTXVideoTransformer3DModel",
    blocks=("transformer_blocks",),
    attention="attn1",
    arguments=(
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
        *_SIZES,
    ),
    grid=_grid,
    project=_project,
    output=_output,
)
