"""Inversion of a video: DDIM from its latents to noise, under the attention of a method."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from stem_kernels.backends import select

from ..config import StemConfig
from ..diffusion.fingerprint import fingerprint
from ..diffusion.pipeline import (
    encode_frames,
    encode_prompt,
    execution_device,
    predict,
)
from ..diffusion.schedule import inverse_scheduler
from ..profiling import nvtx_range
from ..video import Video
from .folder import InversionFolder
from .methods import attention_config, attention_on

logger = logging.getLogger("stem")


def invert(
    pipeline: Any,
    video: Video,
    prompt: str,
    root: str | Path,
    *,
    method: str = "stem",
    options: Mapping[str, Any] | None = None,
    num_steps: int = 50,
    model: str = "",
    keep_bases: bool = False,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
) -> InversionFolder:
    r"""Invert a video, or go on with or reuse the inversion of equal settings below `root`.

    Deterministic DDIM inversion: with $a$ the cumulative alphas, from timestep to timestep,

    $$x_0 = (x - \sqrt{1 - a_p}\, \epsilon) / \sqrt{a_p}, \quad
      x \leftarrow \sqrt{a_t}\, x_0 + \sqrt{1 - a_t}\, \epsilon.$$

    Args:
        pipeline: a Stable Diffusion 1.x, 2.x or XL pipeline.
        video: all its frames go through the UNet as one batch.
        prompt: that describes the video.
        root: the inversion gets a folder of its own below it, named by its settings.
        method: "ddim", "st-ddim", "inflated" or "stem".
        options: fields of the method's configuration, e.g. {"num_bases": 64}.
        num_steps: must divide the training steps of the schedule.
        model: the pipeline's name, for the record.
        keep_bases: with "stem": keep the bases of every step for `reconstruct(bases="cached")`.
        progress: show a progress bar, on a terminal.
        on_step: called after each step that this call did; never where all is reused.

    Returns:
        The complete inversion.

    Raises:
        ValueError: settings that do not fit.

    Source: DDIM inversion, arXiv 2010.02502 and 2105.05233; STEM, arXiv 2312.05856.
    """
    frames = video.frames
    config = attention_config(method, options or {}, frames.shape[0])
    if keep_bases and not isinstance(config, StemConfig):
        raise ValueError(f'keep_bases needs method "stem"; {method} has no bases')
    scheduler = inverse_scheduler(pipeline, num_steps)
    settings = _settings(pipeline, video, prompt, method, config, num_steps, model, keep_bases)
    timesteps = tuple(int(timestep) for timestep in scheduler.timesteps)
    folder = InversionFolder.prepare(Path(root), settings, timesteps)
    if not folder.has_x0():
        folder.save_x0(encode_frames(pipeline, frames))
    if folder.complete:
        logger.info("%s has these settings and is complete; it is reused", folder.path)
        return folder
    done = folder.steps_done
    warm = isinstance(config, StemConfig) and config.init == "previous"
    if warm and done and not folder.has_bases(done - 1):
        logger.info("%s: the bases to go on from are missing; starting afresh", folder.path)
        done = 0
    if done:
        logger.info("%s: going on after step %d of %d", folder.path, done, num_steps)
    else:
        logger.info("%s: inverting %d frames in %d steps", method, frames.shape[0], num_steps)
    latents = folder.latents(done - 1) if done else folder.x0()
    latents = latents.to(execution_device(pipeline))
    conditioning = encode_prompt(pipeline, prompt, frames.shape[1], frames.shape[2])
    with attention_on(pipeline, config) as handle:
        state = None if handle is None else handle.state
        if state is not None:
            state.recording = keep_bases
            if warm and done:
                state.resume(folder.bases(done - 1), timesteps[:done], rows=frames.shape[0])
        bar = tqdm(
            total=num_steps,
            initial=done,
            desc=f"invert {method}",
            disable=None if progress else True,
        )
        with bar:
            for step in range(done, num_steps):
                timestep = scheduler.timesteps[step]
                with nvtx_range(f"invert {method} t={timesteps[step]}"):
                    noise = predict(pipeline, latents, timestep, conditioning)
                    latents = scheduler.step(noise, timestep, latents).prev_sample
                if state is not None and (keep_bases or warm):
                    # Before the latents: a step whose latents are there has its bases, too.
                    folder.save_bases(step, state.bases)
                folder.save_latents(step, latents)
                if warm and not keep_bases and step:
                    folder.drop_bases(step - 1)
                bar.update()
                if on_step is not None:
                    on_step()
    return folder


def _settings(
    pipeline: Any,
    video: Video,
    prompt: str,
    method: str,
    config: Any,
    num_steps: int,
    model: str,
    keep_bases: bool,
) -> dict[str, Any]:
    frames = video.frames
    return {
        "method": method,
        "attention": None if config is None else _as_json(config),
        "prompt": prompt,
        "num_steps": num_steps,
        "keep_bases": keep_bases,
        "model": {"name": model, **fingerprint(pipeline)},
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": execution_device(pipeline).type,
        "backend": _backend(pipeline, config),
        "video": {
            "frames_sha256": hashlib.sha256(
                frames.cpu().contiguous().numpy().tobytes()
            ).hexdigest(),
            "num_frames": frames.shape[0],
            "height": frames.shape[1],
            "width": frames.shape[2],
            "fps": str(video.fps),
        },
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("stem-inversion", "torch", "diffusers")
        },
    }


def _backend(pipeline: Any, config: Any) -> str | None:
    """The backend that a STEM run gets; two of them differ in the last bits."""
    if not isinstance(config, StemConfig):
        return None
    probe = torch.empty(0, device=execution_device(pipeline), dtype=pipeline.unet.dtype)
    return select("invert", config.backend, {"features": probe}, config.num_bases)


def _as_json(config: Any) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }
