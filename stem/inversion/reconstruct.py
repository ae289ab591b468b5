"""Reconstruction: DDIM sampling from an inversion's last latents back to the video."""

from __future__ import annotations

import logging
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config import StemConfig
from ..models import fingerprint
from ..profiling import nvtx_range
from .diffusion import (
    decode_latents,
    encode_prompt,
    execution_device,
    predict,
    sampling_scheduler,
)
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
    scheduler = sampling_scheduler(pipeline, settings["num_steps"])
    conditioning = encode_prompt(pipeline, settings["prompt"], size["height"], size["width"])
    latents = inversion.latents(-1).to(execution_device(pipeline))
    total = len(scheduler.timesteps)
    logger.info(
        "%s: reconstructing %d frames in %d steps", settings["method"], latents.shape[0], total
    )
    with attention_on(pipeline, config) as handle:
        steps = tqdm(
            scheduler.timesteps,
            desc=f"reconstruct {settings['method']}",
            disable=None if progress else True,
        )
        for index, timestep in enumerate(steps):
            if cached and handle is not None and handle.state is not None:
                handle.state.replayed = inversion.bases(total - 1 - index)
            with nvtx_range(f"reconstruct {settings['method']} t={int(timestep)}"):
                noise = predict(pipeline, latents, timestep, conditioning)
                latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def reconstruct(
    pipeline: Any, inversion: InversionFolder, *, bases: str = "estimate", progress: bool = True
) -> torch.Tensor:
    """`reconstruct_latents`, decoded: uint8 frames [N, H, W, 3] on the CPU."""
    latents = reconstruct_latents(pipeline, inversion, bases=bases, progress=progress)
    return decode_latents(pipeline, latents)
