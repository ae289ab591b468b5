"""HunyuanVideo: text after the video, masked; two kinds of blocks. Its token refiner stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import Grid, Operands, Projected, Rotary, VideoFamily, project_out, split_heads


def _grid(config: Any, call: Mapping[str, Any]) -> Grid:
    frames, height, width = call["hidden_states"].shape[2:]
    patch = config.patch_size
    return frames // config.patch_size_t, height // patch, width // patch


def _project(
    attn: Any, hidden: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None
) -> Operands:
    from diffusers.models.embeddings import apply_rotary_emb

    assert text is not None  # see `VideoProcessor`
    apart = attn.add_q_proj is not None
    tokens = hidden if apart else torch.cat([hidden, text], dim=1)
    query, key, value = (
        split_heads(part, attn.heads)
        for part in (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    length = hidden.shape[1]
    of_video = Projected(*(part[:, :, :length] for part in (query, key, value)))
    if apart:
        query, key, value = (
            split_heads(part, attn.heads)
            for part in (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        )
        if attn.norm_added_q is not None:
            query = attn.norm_added_q(query)
        if attn.norm_added_k is not None:
            key = attn.norm_added_k(key)
        of_text = Projected(query, key, value)
    else:
        of_text = Projected(*(part[:, :, length:] for part in (query, key, value)))
    if rotary is not None:
        query, key = (apply_rotary_emb(part, rotary) for part in of_video[:2])
        of_video = Projected(query, key, of_video.value)
    return of_video, of_text


def _output(
    attn: Any, video: torch.Tensor, text: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert text is not None
    if getattr(attn, "to_out", None) is not None:
        video = project_out(attn, video)
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text


HUNYUAN = VideoFamily(
    "HunyuanVideoTransformer3DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention="attn",
    arguments=("hidden_states", "timestep"),
    grid=_grid,
    project=_project,
    output=_output,
)
