"""Inversion of a video along the velocity of a video transformer, on disk."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..attention import enabled, plain
from ..attention.video.state import TIMESTEPS
from ..config import VideoConfig
from ..diffusion.environment import numeric_environment
from ..diffusion.fingerprint import fingerprint
from ..diffusion.loop import check_finite
from ..diffusion.pipeline import VAE_FRAMES
from ..flow.solvers import Velocity, check_solver, moved, noise_levels
from ..names import FLOW_SOURCE
from ..progress import steps as counted
from ..sources import ModelSource
from ..storage import check_output, remove_stale
from .folder import InversionFolder
from .records import attention_record, backend_of, check_video, versions, video_record
from .resuming import latents_before, mend_x0, runs_of, undone_steps

if TYPE_CHECKING:
    from ..flow import VelocityModel
    from ..video import Video, VideoFile

logger = logging.getLogger("stem")

_ENABLED = "enabled"
"""Option that says whether bases are on; the others are the fields of VideoConfig."""


def invert_video(
    model: VelocityModel,
    video: Video | VideoFile,
    prompt: str,
    root: str | Path,
    *,
    method: str = "midpoint",
    options: Mapping[str, Any] | None = None,
    num_steps: int = 50,
    source: str | Mapping[str, Any] = "",
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
) -> InversionFolder:
    """Invert a video through a video transformer, into a folder as `invert` writes it.

    An inversion of equal settings below `root` is continued, repaired or reused, as by `invert`;
    its bits are those of `invert_flow` on the VAE's latents.

    Args:
        model: Model, see `stem.flow.load_video_model`.
        video: Video to invert. All of it goes through the VAE and the transformer at once.
        prompt: Prompt that describes the video.
        root: Folder below which the inversion gets a folder of its own, named by its settings.
        method: Solver, "midpoint" (two calls of the transformer a step) or "euler" (one).
        options: Fields of `VideoConfig`, e.g. {"window": 2}; {"enabled": False} leaves the
            transformer's own attention.
        num_steps: Number of steps, at least 1.
        source: Name of the model, for the record; or a mapping of `name` and the other arguments
            that it was loaded with, as for `invert`'s `model`.
        progress: Whether to show progress.
        on_step: Function called after each step that this call computes.

    Returns:
        The complete inversion. Its timesteps are the noise levels x 1,000, rounded.

    Raises:
        TypeError: the video or the prompt is of another type.
        ValueError: the settings do not fit.
        OSError: the folder cannot be written, or its disk has too little space for all steps.
        NonFiniteError: latents are not finite after a step.

    Source: the midpoint rule; arXiv 2411.04746 (RF-Solver).
    """
    check_solver(method)
    folder, environment = _prepared(
        model, video, prompt, Path(root), method, options, num_steps, source
    )
    undone = undone_steps(folder, environment)
    if not undone:
        logger.info("%s has these settings and is complete; it is reused", folder.path)
        return folder
    check_output(folder.path, 4 * folder.x0().numel() * len(undone))
    levels = noise_levels(num_steps, folder.settings["shift"])

    def keep(step: int, latents: torch.Tensor) -> None:
        folder.save_latents(step, latents, environment)
        if on_step is not None:
            on_step()

    with flow_attention_on(model, folder), torch.no_grad():
        conditions = model.conditions(prompt)
        for steps in runs_of(undone):
            follow(
                lambda latents, level: model.velocity(latents, level, conditions),
                latents_before(folder, steps.start).to(model.device),
                levels,
                method,
                steps=steps,
                after_step=keep,
                name=f"invert {method}",
                progress=progress,
            )
    return folder


def keep_source(
    model: VelocityModel,
    video: Video | VideoFile,
    prompt: str,
    root: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    num_steps: int = 50,
    source: str | Mapping[str, Any] = "",
) -> InversionFolder:
    """Keep a video's latents, and nothing of an inversion, for `stem.editing.flow_edit`.

    Args:
        model: Model, see `stem.flow.load_video_model`.
        video: Video to edit.
        prompt: Prompt that describes it.
        root: Folder below which it gets a folder of its own, named by its settings.
        options: Fields of `VideoConfig` for the edit, as for `invert_video`.
        num_steps: Number of steps that the noise levels of the edit are cut into.
        source: Name of the model, as for `invert_video`.

    Returns:
        A folder with no steps.

    Raises:
        TypeError, ValueError, OSError: as `invert_video`.
    """
    folder, _ = _prepared(model, video, prompt, Path(root), FLOW_SOURCE, options, num_steps, source)
    return folder


def follow(
    velocity: Velocity,
    latents: torch.Tensor,
    levels: list[float],
    solver: str,
    *,
    steps: range,
    after_step: Callable[[int, torch.Tensor], None],
    name: str,
    progress: bool,
) -> torch.Tensor:
    """Follow a velocity along noise levels, in either direction.

    Args:
        velocity: Velocity at latents and a noise level.
        latents: Latents [1, C, F, h, w] before the first of `steps`, float32.
        levels: Noise levels between all steps.
        solver: Solver, "midpoint" or "euler".
        steps: Steps to do.
        after_step: Function called with each step and the latents after it.
        name: Name of the run, for the progress shown and for errors.
        progress: Whether to show progress.

    Raises:
        NonFiniteError: latents are not finite after a step.
    """
    total = len(levels) - 1
    with counted(total, initial=steps.start, name=name, show=progress) as shown:
        for step in steps:
            latents = moved(velocity, latents, levels[step], levels[step + 1], solver)
            where = f"{name}, step {step + 1} of {total} (noise level {levels[step + 1]:.3f})"
            check_finite(latents[0].transpose(0, 1), where)
            after_step(step, latents)
            shown.update()
    return latents


def video_attention(options: Mapping[str, Any] | None) -> VideoConfig | None:
    """The attention that options ask for; None: the transformer's own.

    Args:
        options: Fields of `VideoConfig`, and "enabled".

    Raises:
        ValueError: an unknown option, or a value that an option refuses.
    """
    rest = dict(options or {})
    on = rest.pop(_ENABLED, True)
    fields = [field.name for field in dataclasses.fields(VideoConfig)]
    for name in rest:
        if name not in fields:
            raise ValueError(
                f"STEM in a video transformer has no option {name!r}; it has "
                f"{', '.join((_ENABLED, *fields))}"
            )
    if not isinstance(on, bool) or (not on and rest):
        raise ValueError(
            f"enabled is {on!r}{' beside ' + ', '.join(rest) if rest else ''}; it must be True, or "
            "False alone, which leaves the transformer's own attention"
        )
    if isinstance(rest.get("dense_blocks"), int):  # one number, as the command line reads it
        rest["dense_blocks"] = (rest["dense_blocks"],)
    return VideoConfig(**rest) if on else None


def flow_attention_on(
    model: VelocityModel, inversion: InversionFolder
) -> AbstractContextManager[Any]:
    """The attention of an inversion on in the model, for the length of a `with` block.

    Args:
        model: Model.
        inversion: Inversion through a video transformer, or the source of an edit.
    """
    config = video_attention(inversion.settings["attention"])
    return plain(model.transformer) if config is None else enabled(model.transformer, config)


def _prepared(
    model: VelocityModel,
    video: Video | VideoFile,
    prompt: str,
    root: Path,
    method: str,
    options: Mapping[str, Any] | None,
    num_steps: int,
    source: str | Mapping[str, Any],
) -> tuple[InversionFolder, dict[str, str]]:
    """The folder with the video's own latents in it, and the environment of this process."""
    check_video(video, prompt)
    config = video_attention(options)
    size = video.num_frames, video.height, video.width
    model.check_size(*size)
    levels = noise_levels(num_steps, model.shift)
    check_output(root / method, 4 * math.prod(model.latent_shape(*size)))
    environment = numeric_environment(model)
    of_model = ModelSource.of(source)
    backend = None
    if config is not None:
        num_bases = -(-model.num_tokens(*size) // config.tokens_per_base)
        backend = backend_of(config.backend, num_bases, model.device, model.dtype)
    settings = {
        "method": method,
        "attention": {_ENABLED: config is not None, **(attention_record(config) if config else {})},
        "prompt": prompt,
        "num_steps": num_steps,
        "shift": model.shift,
        "keep_bases": False,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "backend": backend,
        "video": video_record(video),
        "versions": versions(),
        "model": {"name": of_model.name, **of_model.additions, **fingerprint(model)},
    }
    with_steps = levels[1:] if method != FLOW_SOURCE else []
    timesteps = tuple(round(TIMESTEPS * level) for level in with_steps)
    folder, wrong = InversionFolder.prepare(root, settings, timesteps)
    if wrong:
        logger.warning("%s; the settings were written again", wrong)
    remove_stale(folder.path)

    def encode() -> torch.Tensor:
        return model.encode(torch.cat(list(video.parts(VAE_FRAMES))))

    mend_x0(folder, environment, encode)
    return folder, environment
