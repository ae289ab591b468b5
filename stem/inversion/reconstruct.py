"""Reconstruction: DDIM sampling from an inversion's last latents back to the video."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from stem_kernels.ops.soft_em import SoftEM

from ..config import AttentionConfig, StemConfig
from ..diffusion.fingerprint import fingerprint
from ..diffusion.pipeline import (
    Conditioning,
    decode_latents,
    encode_prompt,
    execution_device,
    predict,
)
from ..diffusion.schedule import sampling_scheduler
from ..profiling import nvtx_range
from .folder import InversionError, InversionFolder
from .methods import attention_config, attention_on

logger = logging.getLogger("stem")

BASES = ("estimate", "cached")


def reconstruct_latents(
    pipeline: Any, inversion: InversionFolder, *, bases: str = "estimate", progress: bool = True
) -> torch.Tensor:
    """Sample back from the noisiest latents, with the inversion's prompt and attention.

    Args:
        pipeline: the one that the inversion was made with.
        inversion: complete.
        bases: of "stem": "estimate" runs EM again at each step; "cached" takes the bases that
            the inversion kept at that timestep (`keep_bases`).
        progress: show a progress bar, on a terminal.

    Returns:
        float32 [N, c, h, w], to be compared with `inversion.x0()`.

    Raises:
        InversionError: incomplete, made with another model, or without the bases asked for.
    """
    settings = inversion.settings
    if bases not in BASES:
        raise ValueError(f"bases is {bases!r}; it must be one of {', '.join(BASES)}")
    if not inversion.complete:
        raise InversionError(
            f"{inversion.path} has {inversion.steps_done} of {len(inversion.timesteps)} steps; "
            "run the inversion again, it goes on where it stopped"
        )
    if settings["model"] != {"name": settings["model"]["name"], **fingerprint(pipeline)}:
        raise InversionError(
            f"{inversion.path} was made with the model {settings['model']['name']!r}, whose "
            "configuration or weights (LoRA included) differ from this pipeline's; load that one"
        )
    cached = bases == "cached"
    if cached and not settings["keep_bases"]:
        raise InversionError(
            f"{inversion.path} has no cached bases; invert with keep_bases (--keep-bases)"
        )
    options = dict(settings["attention"] or {})
    options.pop("num_frames", None)
    size = settings["video"]
    config = attention_config(settings["method"], options, size["num_frames"])
    if cached and not isinstance(config, StemConfig):
        raise InversionError(f"{inversion.path} is an inversion by {settings['method']}, not stem")
    conditioning = encode_prompt(pipeline, settings["prompt"], size["height"], size["width"])
    latents = inversion.latents(-1).to(execution_device(pipeline))
    total = settings["num_steps"]
    logger.info(
        "%s: reconstructing %d frames in %d steps", settings["method"], latents.shape[0], total
    )
    return sample(
        pipeline,
        latents,
        conditioning,
        total,
        config,
        bases_at=inversion.bases if cached else None,
        name=f"reconstruct {settings['method']}",
        progress=progress,
    )


def sample(
    pipeline: Any,
    latents: torch.Tensor,
    conditioning: Conditioning,
    num_steps: int,
    config: AttentionConfig | None,
    *,
    bases_at: Callable[[int], dict[int, SoftEM]] | None = None,
    name: str = "reconstruct",
    progress: bool = False,
) -> torch.Tensor:
    """DDIM sampling from the noisiest latents [N, c, h, w] under an attention.

    Args:
        pipeline, conditioning: as for `predict`.
        latents: float32, on the pipeline's device.
        num_steps: of the sampling.
        config: of the attention; None: the UNet's own.
        bases_at: with a StemConfig: the bases to take at a step of the inversion, in place of EM.
        name: of the progress bar and of the profiler's ranges.
        progress: show a progress bar, on a terminal.
    """
    scheduler = sampling_scheduler(pipeline, num_steps)
    with attention_on(pipeline, config) as handle:
        steps = tqdm(scheduler.timesteps, desc=name, disable=None if progress else True)
        for index, timestep in enumerate(steps):
            if bases_at is not None and handle is not None and handle.state is not None:
                handle.state.replayed = bases_at(num_steps - 1 - index)
            with nvtx_range(f"{name} t={int(timestep)}"):
                noise = predict(pipeline, latents, timestep, conditioning)
                latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def reconstruct(
    pipeline: Any, inversion: InversionFolder, *, bases: str = "estimate", progress: bool = True
) -> torch.Tensor:
    """`reconstruct_latents`, decoded: uint8 frames [N, H, W, 3] on the CPU."""
    latents = reconstruct_latents(pipeline, inversion, bases=bases, progress=progress)
    return decode_latents(pipeline, latents)
