"""Reconstruction through a video transformer: from an inversion's noise back to the video."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..diffusion.environment import numeric_environment
from ..flow.solvers import noise_levels
from ..names import FLOW_METHODS
from .flow_inverting import flow_attention_on, follow
from .folder import InversionFolder, Progress
from .runs import check_same_weights, check_startable, earlier_run, run_name, start_of

if TYPE_CHECKING:
    from ..flow import VelocityModel

logger = logging.getLogger("stem")


def reconstruct_video_latents(
    model: VelocityModel,
    inversion: InversionFolder,
    *,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Follow the velocity back from the noise, with the inversion's prompt, solver and attention.

    Args:
        model: Model that the inversion was made with.
        inversion: Inversion that `invert_video` made, complete.
        resume: Whether to keep the latents reached so far in the inversion's folder, and to go on
            from those that an earlier call kept there.
        progress: Whether to show progress.
        on_step: Function called after each step that this call computes.

    Returns:
        float32 [1, C, F, h, w], to be compared with `inversion.x0()`.

    Raises:
        InversionError: the inversion is incomplete, of a UNet, or was made with another model.
        NonFiniteError: latents are not finite after a step.
    """
    check_startable(inversion, FLOW_METHODS)
    check_same_weights(model, model.dtype, inversion)
    settings = inversion.settings
    method, total = settings["method"], settings["num_steps"]
    environment = numeric_environment(model)
    run = run_name(inversion, "reconstruction-", [method])
    found = earlier_run(inversion, run, "reconstruction", environment) if resume else None
    done, latents = (0, start_of(inversion)) if found is None else (found.steps_done, found.latents)
    if done < total:
        frames = settings["video"]["num_frames"]
        logger.info("%s: reconstructing %d frames in %d steps", method, frames, total)

    def keep(step: int, latents: torch.Tensor) -> None:
        if resume:
            inversion.save_progress(run, Progress(step + 1, latents, environment))
        if on_step is not None:
            on_step()

    with flow_attention_on(model, inversion), torch.no_grad():
        conditions = model.conditions(settings["prompt"])
        return follow(
            lambda latents, level: model.velocity(latents, level, conditions),
            latents.to(model.device),
            noise_levels(total, settings["shift"])[::-1],
            method,
            steps=range(done, total),
            after_step=keep,
            name=f"reconstruct {method}",
            progress=progress,
        )


def reconstruct_video(
    model: VelocityModel, inversion: InversionFolder, *, progress: bool = True
) -> torch.Tensor:
    """Reconstruct a video from its inversion: `reconstruct_video_latents`, then the decoder.

    Args:
        model: Model that the inversion was made with.
        inversion: Inversion that `invert_video` made, complete.
        progress: Whether to show progress.

    Returns:
        uint8 [N, H, W, 3] on the CPU.

    Raises:
        InversionError, NonFiniteError: as `reconstruct_video_latents`.
    """
    return model.decode(reconstruct_video_latents(model, inversion, progress=progress))
