"""Inversion of a video: DDIM from its latents to noise, under the attention of a method."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stem_kernels.backends import select

from ..attention.stem import StemState
from ..config import StemConfig
from ..diffusion.environment import numeric_environment, warn_of_differences
from ..diffusion.fingerprint import fingerprint
from ..diffusion.loop import denoise, guided
from ..diffusion.pipeline import check_pipeline, encode_frames, encode_prompt, execution_device
from ..diffusion.schedule import inverse_scheduler
from ..storage import check_output, remove_stale
from .folder import InversionFolder, MissingFileError
from .methods import attention_config, attention_on

if TYPE_CHECKING:
    from ..video import Video

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
    r"""Invert a video, or go on with, mend or reuse the inversion of equal settings below `root`.

    Deterministic DDIM inversion: with $a$ the cumulative alphas, from timestep to timestep,

    $$x_0 = (x - \sqrt{1 - a_p}\, \epsilon) / \sqrt{a_p}, \quad
      x \leftarrow \sqrt{a_t}\, x_0 + \sqrt{1 - a_t}\, \epsilon.$$

    A step whose file is missing, damaged or truncated is computed again from the one before, and
    the log says so; the others are kept. Its bits are the same at the same number of threads on
    the same kind of machine; a warning says where that has changed.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x or XL pipeline.
        video: Video whose frames go through the UNet as one batch.
        prompt: Prompt that describes the video.
        root: Folder below which the inversion gets one of its own, named by its settings.
        method: Name of the inversion, "ddim", "st-ddim", "inflated" or "stem".
        options: Fields of the method's configuration, e.g. {"num_bases": 64}.
        num_steps: Number of steps; it must divide the training steps of the schedule.
        model: Name of the pipeline, for the record.
        keep_bases: Whether to keep, with "stem", the bases of every step for
            `reconstruct(bases="cached")`.
        progress: Whether to show progress.
        on_step: Function called after each step that this call did; never where all is reused.

    Returns:
        The complete inversion.

    Raises:
        ValueError: settings that do not fit, or a pipeline that cannot be inverted.
        OSError: the folder cannot be written, or its disk has too little space for all steps.

    Source: DDIM inversion, arXiv 2010.02502 and 2105.05233; STEM, arXiv 2312.05856.
    """
    frames = video.frames
    check_pipeline(pipeline)
    config = attention_config(method, options or {}, frames.shape[0])
    if keep_bases and not isinstance(config, StemConfig):
        raise ValueError(f'keep_bases needs method "stem"; {method} has no bases')
    scheduler = inverse_scheduler(pipeline, num_steps)
    check_output(Path(root) / method)
    settings = _settings(pipeline, video, prompt, method, config, num_steps, model, keep_bases)
    timesteps = tuple(int(timestep) for timestep in scheduler.timesteps)
    folder, wrong = InversionFolder.prepare(Path(root), settings, timesteps)
    if wrong:
        logger.warning("%s; the settings were written again", wrong)
    remove_stale(folder.path)
    device = execution_device(pipeline)
    environment = numeric_environment(device)
    _mend_x0(pipeline, folder, frames, environment)
    undone = _undone(folder, environment)
    if not undone:
        logger.info("%s has these settings and is complete; it is reused", folder.path)
        return folder
    conditioning = encode_prompt(pipeline, prompt, frames.shape[1], frames.shape[2])
    with attention_on(pipeline, config) as handle:
        state = None if handle is None or not keep_bases else handle.state
        if state is not None:
            state.recording = True
        x0 = folder.x0()
        check_output(folder.path, len(undone) * (4 * x0.numel() + _bytes_of_bases(state)))

        def keep(step: int, latents: torch.Tensor) -> None:
            if state is not None:
                # Before the latents: a step whose latents are there has its bases, too.
                folder.save_bases(step, state.bases, environment)
            folder.save_latents(step, latents, environment)
            if on_step is not None:
                on_step()

        for steps in _runs(undone):
            before = folder.latents(steps.start - 1) if steps.start else x0
            denoise(
                before.to(device),
                scheduler,
                guided(pipeline, conditioning),
                steps=steps,
                after_step=keep,
                name=f"invert {method}",
                progress=progress,
            )
    return folder


def _mend_x0(
    pipeline: Any, folder: InversionFolder, frames: torch.Tensor, environment: dict[str, str]
) -> None:
    wrong = folder.x0_problems()
    if not wrong:
        return
    if folder.steps_done or not isinstance(wrong[0], MissingFileError):
        logger.warning("%s; the video is encoded again", wrong[0].problem)
    folder.save_x0(encode_frames(pipeline, frames), environment)


def _undone(folder: InversionFolder, environment: dict[str, str]) -> list[int]:
    """The steps to do, ascending; the log says why where it is not the first run."""
    problems = [folder.step_problems(step) for step in range(len(folder.timesteps))]
    undone = [step for step, wrong in enumerate(problems) if wrong]
    whole = [step for step, wrong in enumerate(problems) if not wrong]
    # Missing files after the last whole step are of a run that was stopped; others were lost.
    last = max(whole, default=-1)
    for step in undone:
        for wrong in problems[step]:
            if step < last or not isinstance(wrong, MissingFileError):
                logger.warning("%s; step %d is computed again", wrong.problem, step + 1)
    name, total = folder.settings["method"], len(folder.timesteps)
    if undone and whole:
        logger.info("%s: %d of %d steps are done, going on", folder.path, len(whole), total)
        warn_of_differences(folder.path, folder.environment(whole[-1]), environment)
    elif undone:
        frames = folder.settings["video"]["num_frames"]
        logger.info("%s: inverting %d frames in %d steps", name, frames, total)
    return undone


def _runs(steps: list[int]) -> Iterator[range]:
    """Ascending numbers as runs of consecutive ones."""
    for _, run in itertools.groupby(enumerate(steps), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        yield range(numbers[0], numbers[-1] + 1)


def _bytes_of_bases(state: StemState | None) -> int:
    """The size of one step's bases on disk, about: bases, payload and mass in float32."""
    if state is None:
        return 0
    numbers = sum(torch.Size(shape).numel() for shape in state.bases_shapes)
    return 4 * numbers * (2 if state.config.space == "key" else 1)


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
