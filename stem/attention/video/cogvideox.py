"""CogVideoX: text and video in one sequence, the text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import Grid, Operands, Projected, Rotary, VideoFamily, project_out, split_heads


def _grid(config: Any, call: Mapping[str, Any]) -> Grid:
    _, frames, _, height, width = call["hidden_states"].shape
    in_time, patch = config.patch_size_t or 1, config.patch_size
    return (frames + in_time - 1) // in_time, height // patch, width // patch


def _project(
    attn: Any, hidden: torch.Tensor, text: torch.Tensor | None, rotary: Rotary | None
) -> Operands:
    from diffusers.models.embeddings import apply_rotary_emb

    assert text is not None  # see `VideoProcessor`
    both = torch.cat([text, hidden], dim=1)
    query, key, value = (
        split_heads(part, attn.heads)
        for part in (attn.to_q(both), attn.to_k(both), attn.to_v(both))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    of_text, of_video = (
        Projected(*(part[:, :, where] for part in (query, key, value)))
        for where in (slice(text.shape[1]), slice(text.shape[1], None))
    )
    if rotary is not None:
        query, key = (apply_rotary_emb(part, rotary) for part in of_video[:2])
        of_video = Projected(query, key, of_video.value)
    return of_video, of_text


def _output(
    attn: Any, video: torch.Tensor, text: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert text is not None
    return project_out(attn, video), project_out(attn, text)


COGVIDEOX = VideoFamily(
    "CogVideoXTransformer3DModel",
    blocks=("transformer_blocks",),
    attention="attn1",
    arguments=("hidden_states", "encoder_hidden_states", "timestep"),
    grid=_grid,
    project=_project,
    output=_output,
    flow=False,
)
