"""Inversion and the way back in memory, for measurements that keep nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..config import AttentionConfig, StemConfig
from ..diffusion.pipeline import encode_prompt, predict, vae_factor
from ..diffusion.schedule import inverse_scheduler
from .methods import attention_on
from .reconstruct import sample


def round_trip(
    pipeline: Any,
    latents: torch.Tensor,
    prompt: str,
    num_steps: int,
    config: AttentionConfig | None = None,
    *,
    cached: bool = False,
    on_inverted: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """What `invert` and `reconstruct_latents` give, without a file.

    Args:
        pipeline: as for `invert`.
        latents: of the frames, float32 [N, c, h, w], from `encode_frames`.
        prompt: that describes the video.
        num_steps: of the inversion, and of the way back.
        config: of the attention; None: the UNet's own. Its `num_frames` may be fewer than N.
        cached: with a StemConfig: sample with the bases of the inversion.
        on_inverted: called with the timestep after each step of the inversion.

    Returns:
        float32 [N, c, h, w].
    """
    if cached and not isinstance(config, StemConfig):
        raise ValueError(f"cached is True and config is {config!r}; only StemConfig has bases")
    factor = vae_factor(pipeline)
    height, width = latents.shape[2] * factor, latents.shape[3] * factor
    conditioning = encode_prompt(pipeline, prompt, height, width)
    kept = []
    scheduler = inverse_scheduler(pipeline, num_steps)
    with attention_on(pipeline, config) as handle:
        state = None if handle is None else handle.state
        if state is not None:
            state.recording = cached
        for timestep in scheduler.timesteps:
            noise = predict(pipeline, latents, timestep, conditioning)
            latents = scheduler.step(noise, timestep, latents).prev_sample
            if cached and state is not None:
                kept.append(dict(state.bases))
            if on_inverted is not None:
                on_inverted(int(timestep))
    bases_at = kept.__getitem__ if cached else None
    return sample(pipeline, latents, conditioning, num_steps, config, bases_at=bases_at)
