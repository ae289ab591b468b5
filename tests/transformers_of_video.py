"""Video transformers of each class that is served, of few random weights, and their calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)

FRAMES = 3
SIDE = 4
"""Height and width in tokens."""
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}
PIXELS: dict[str, Any] = {**HEADS, "in_channels": 4, "out_channels": 4}


@dataclass(frozen=True)
class Transformer:
    """A class and how it is called.

    Args:
        make: Function that makes the model.
        arguments: Function of (videos, generator) that makes a call's arguments but the timestep.
        layers: Number of its self-attentions.
        joined: Whether text and video are in one attention.
    """

    make: Callable[[], Any]
    arguments: Callable[[int, torch.Generator], dict[str, Any]]
    layers: int
    joined: bool


def _wan_arguments(videos: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(videos, 4, FRAMES, 2 * SIDE, 2 * SIDE, generator=generator),
        "encoder_hidden_states": torch.randn(videos, 5, 16, generator=generator),
    }


def _cogvideox_arguments(videos: int, generator: torch.Generator) -> dict[str, Any]:
    angles = torch.randn(FRAMES * SIDE * SIDE, 6, generator=generator).repeat_interleave(2, 1)
    return {
        "hidden_states": torch.randn(videos, FRAMES, 4, 2 * SIDE, 2 * SIDE, generator=generator),
        "encoder_hidden_states": torch.randn(videos, 5, 16, generator=generator),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _hunyuan_arguments(videos: int, generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(videos, 6, dtype=torch.long)
    mask[-1, 4:] = 0
    return {
        **_wan_arguments(videos, generator),
        "encoder_hidden_states": torch.randn(videos, 6, 16, generator=generator),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(videos, 8, generator=generator),
    }


def _ltx_arguments(videos: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(videos, FRAMES * SIDE * SIDE, 4, generator=generator),
        "encoder_hidden_states": torch.randn(videos, 5, 16, generator=generator),
        "encoder_attention_mask": torch.ones(videos, 5),
        "num_frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
    }


TRANSFORMERS = {
    "wan": Transformer(
        lambda: WanTransformer3DModel(
            **PIXELS, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32
        ),
        _wan_arguments,
        2,
        joined=False,
    ),
    "cogvideox": Transformer(
        lambda: CogVideoXTransformer3DModel(
            **PIXELS,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            max_text_seq_length=5,
            use_rotary_positional_embeddings=True,
        ),
        _cogvideox_arguments,
        2,
        joined=True,
    ),
    "hunyuan": Transformer(
        lambda: HunyuanVideoTransformer3DModel(
            **PIXELS,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 4, 4),
            guidance_embeds=False,
        ),
        _hunyuan_arguments,
        2,
        joined=True,
    ),
    "ltx": Transformer(
        lambda: LTXVideoTransformer3DModel(
            **PIXELS, cross_attention_dim=24, num_layers=2, caption_channels=16
        ),
        _ltx_arguments,
        2,
        joined=False,
    ),
}


def make_transformer(name: str) -> Any:
    """A model whose attention is sharp enough to tell tokens apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TRANSFORMERS[name].make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def arguments_of(name: str, videos: int = 1, timestep: float = 500.0) -> dict[str, Any]:
    """The arguments of a call, the same in every run."""
    made = TRANSFORMERS[name].arguments(videos, torch.Generator().manual_seed(videos))
    return {**made, "timestep": torch.full((videos,), timestep)}


def call(model: Any, name: str, videos: int = 1, **changes: Any) -> torch.Tensor:
    """What a model returns."""
    return model(**{**arguments_of(name, videos), **changes}).sample
