"""Inversion and the way back in memory, for measurements that keep nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attention import Recording
from ..attention.layers.hooks import LayerBases
from ..config import AttentionConfig, PerFrameConfig, StemConfig
from ..control import Control
from ..diffusion.control import Shown, checked_controls
from ..diffusion.loop import denoise, guided
from ..diffusion.memory import chunk_that_fits, frames_shared, largest_chunk
from ..diffusion.motion import check_frames
from ..diffusion.pipeline import encode_prompt, vae_factor
from ..diffusion.schedule import inverse_scheduler
from .inverting import check_chunk
from .methods import attention_on
from .reconstructing import sample


def round_trip(
    pipeline: Any,
    latents: torch.Tensor,
    prompt: str,
    num_steps: int,
    config: AttentionConfig | None = None,
    *,
    control: Sequence[Control] = (),
    cached: bool = False,
    on_inverted: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The latents that `invert` and then `reconstruct_latents` give, without a file.

    Args:
        pipeline: Pipeline, as for `invert`.
        latents: Latents of the frames, float32 [N, c, h, w], from `encode_frames`.
        prompt: Prompt that describes the video.
        num_steps: Number of steps of the inversion and of the reconstruction.
        config: Configuration of the attention; None: the UNet's own. Its `num_frames` may be
            fewer than N.
        control: What each of the pipeline's ControlNets is shown.
        cached: Whether to sample with the bases of the inversion; with a StemConfig only.
        on_inverted: Function called with the timestep after each step of the inversion.

    Returns:
        float32 [N, c, h, w].

    Raises:
        ValueError: `cached` without a StemConfig, a number of steps that cannot be inverted, or
            controls that do not fit the pipeline's ControlNets.
    """
    controls = checked_controls(pipeline, control, latents.shape[0], *pixels(pipeline, latents))
    check_frames(pipeline, latents.shape[0])
    if cached and not isinstance(config, StemConfig):
        raise ValueError(f"cached is True and config is {config!r}; only StemConfig has bases")
    scheduler = inverse_scheduler(pipeline, num_steps)
    conditioning = encode_prompt(pipeline, prompt, *pixels(pipeline, latents))
    prediction = guided(pipeline, conditioning.showing(shown_in(scheduler, controls)))
    kept: list[dict[int, LayerBases]] = []
    with attention_on(pipeline, config) as handle:
        state = None if handle is None or not cached else handle.state
        recording = Recording()
        if state is not None:
            state.hooks.add("recording", recording)

        def keep(step: int, latents: torch.Tensor) -> None:
            if state is not None:
                kept.append(dict(recording.found))
            if on_inverted is not None:
                on_inverted(int(scheduler.timesteps[step]))

        latents = denoise(latents, scheduler, prediction, after_step=keep, name="invert")
    bases_at = kept.__getitem__ if cached else None
    return sample(pipeline, latents, prediction, num_steps, config, bases_at=bases_at)


def shown_in(scheduler: Any, controls: tuple[Control, ...]) -> Shown | None:
    """What the ControlNets are shown in an inversion, and on the way back; None without control.

    Args:
        scheduler: Scheduler of the inversion, whose timesteps ascend.
        controls: What each ControlNet is shown.
    """
    return Shown(controls, tuple(map(int, scheduler.timesteps))) if controls else None


def pixels(pipeline: Any, latents: torch.Tensor) -> tuple[int, int]:
    """Height and width in pixels of the frames of latents [N, c, h, w]."""
    factor = vae_factor(pipeline)
    return latents.shape[2] * factor, latents.shape[3] * factor


def chunked(
    pipeline: Any,
    config: AttentionConfig,
    latents: torch.Tensor,
    chunk: int | str | None,
    ranks: int = 1,
) -> AttentionConfig:
    """The configuration for one video, whose frames go through the UNet in chunks.

    Args:
        pipeline: Pipeline whose UNet is called.
        config: Configuration of the attention.
        latents: Latents of the frames, [N, c, h, w].
        chunk: Number of frames that go through the UNet at once; "auto": as many as fit into free
            memory and leave each rank a chunk; None: all.
        ranks: Number of ranks that share the chunks.

    Raises:
        ValueError: another `chunk`.
        MemoryError: not even a chunk of one frame fits.
    """
    check_chunk(chunk)
    frames = latents.shape[0]
    if isinstance(chunk, str):
        fit_frames = config.fit_frames if isinstance(config, StemConfig) else None
        chunk = chunk_that_fits(
            pipeline,
            frames,
            *pixels(pipeline, latents),
            branches=1,
            meets=not isinstance(config, PerFrameConfig) and fit_frames is None,
            largest=largest_chunk(frames_shared(frames, fit_frames), ranks),
        )
    whole = chunk is None or chunk >= frames
    return dataclasses.replace(config, num_frames=frames, chunk=None if whole else chunk)
