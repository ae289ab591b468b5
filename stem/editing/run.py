"""Editing a video by a prompt, from its inversion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from stem_kernels.ops.calibration import CALIBRATIONS

from ..control import Control
from ..diffusion.control import Shown, checked_controls
from ..diffusion.environment import numeric_environment
from ..diffusion.loop import denoise
from ..diffusion.motion import check_frames
from ..diffusion.pipeline import encode_prompt, execution_device
from ..diffusion.schedule import clean_of, sampling_scheduler
from ..distributed import Ranks
from ..inversion import InversionFolder
from ..inversion.folder import Progress
from ..inversion.methods import running_conditions
from ..inversion.runs import check_same_pipeline, earlier_run, run_name
from ..names import EDIT_METHODS
from .checks import DEFAULT_METHOD, check_edit, edit_options, edit_settings
from .job import Edit, Job, Method, Options
from .methods.fatezero import FateZero
from .methods.fusion import Fusion
from .methods.pnp import PnP
from .methods.sdedit import SDEdit
from .methods.tokenflow import TokenFlow
from .pasting import edited_frames

logger = logging.getLogger("stem")

_METHODS: dict[str, type[Method]] = dict(
    zip(EDIT_METHODS, (PnP, TokenFlow, SDEdit, FateZero, Fusion), strict=True)
)


@dataclass(frozen=True)
class Preview:
    """Who wants to see an edit while it runs: after a quarter, a half, three quarters of its steps.

    Args:
        frames: Numbers of the frames to see.
        show: Function called on the first rank with the numbers of steps done and of all, and the
            clean latents [frames, c, h, w] that are predicted then.
    """

    frames: Sequence[int]
    show: Callable[[int, int, torch.Tensor], None]


def edit(
    pipeline: Any,
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str = DEFAULT_METHOD,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: Options | Mapping[str, Any] | None = None,
    control: Control | Sequence[Control] | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Edit a video by a prompt: `run_edit`, as frames (`stem.editing.edited_parts`).

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to start from, complete.
        prompt: Prompt that describes the edited video.
        method: Name of the method, a key of `stem.editing.METHODS`.
        negative_prompt: Negative prompt, used with guidance only.
        guidance: Classifier-free guidance scale; None: the scale of the method's options.
        seed: Seed of the method's random numbers.
        options: Options of the method: its dataclass in `stem.editing`, or some of its fields by
            name.
        control: What the pipeline's ControlNet is shown in the edit, or each of several; None:
            what it was shown in the inversion, as the source's branch always is.
        group: Process group whose ranks share the frames; all ranks make this call. Its first
            rank alone reads and writes the inversion's folder.
        progress: Whether to show progress.

    Returns:
        uint8 [N, H, W, 3] on the CPU.

    Raises:
        ValueError, InversionError, NonFiniteError: as `edit_latents`.
    """
    found = run_edit(
        pipeline,
        inversion,
        prompt,
        method=method,
        negative_prompt=negative_prompt,
        guidance=guidance,
        seed=seed,
        options=options,
        control=control,
        group=group,
        progress=progress,
    )
    return Ranks(group).from_main(lambda: edited_frames(pipeline, inversion, found))


def edit_latents(
    pipeline: Any,
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str = DEFAULT_METHOD,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: Options | Mapping[str, Any] | None = None,
    control: Control | Sequence[Control] | None = None,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Edit a video by a prompt, starting from the noisiest latents of its inversion.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to start from, complete. The edit takes its attention, steps and
            frames, and its prompt as the source's.
        prompt: Prompt that describes the edited video.
        method: Name of the method, a key of `stem.editing.METHODS`.
        negative_prompt: Negative prompt, used with guidance only.
        guidance: Classifier-free guidance scale; None: the scale of the method's options.
        seed: Seed of the method's random numbers.
        options: Options of the method: its dataclass in `stem.editing`, or some of its fields by
            name.
        control: What the pipeline's ControlNet is shown in the edit, or each of several; None:
            what it was shown in the inversion, as the source's branch always is.
        group: Process group whose ranks share the frames; all ranks make this call. Its first
            rank alone reads and writes the inversion's folder.
        progress: Whether to show progress.

    Returns:
        float32 [N, c, h, w].

    Raises:
        ValueError: a setting does not fit, and the message names what is allowed; or words are not
            in the prompts.
        InversionError: the inversion is incomplete or was made with another model.
        NonFiniteError: latents are not finite after a step.
    """
    return run_edit(
        pipeline,
        inversion,
        prompt,
        method=method,
        negative_prompt=negative_prompt,
        guidance=guidance,
        seed=seed,
        options=options,
        control=control,
        group=group,
        progress=progress,
    ).latents


def run_edit(
    pipeline: Any,
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str = DEFAULT_METHOD,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: Options | Mapping[str, Any] | None = None,
    control: Control | Sequence[Control] | None = None,
    group: dist.ProcessGroup | None = None,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
    preview: Preview | None = None,
) -> Edit:
    """Edit a video as `edit_latents` does; return its masks or pivots and its settings, too.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion to start from, complete.
        prompt: Prompt that describes the edited video.
        method: Name of the method.
        negative_prompt: Negative prompt.
        guidance: Classifier-free guidance scale, or None.
        seed: Seed of the method's random numbers.
        options: Options of the method.
        control: What the pipeline's ControlNets are shown in the edit, or None.
        group: Process group whose ranks share the frames, or None.
        resume: Whether to keep the latents reached so far in the inversion's folder, and to go on
            from those that an earlier call of equal arguments kept there.
        progress: Whether to show progress.
        on_step: Function called after each step that this call computes.
        preview: Who wants to see the edit while it runs, or None.

    Raises:
        ValueError, InversionError, NonFiniteError: as `edit_latents`.
    """
    chosen, ranks = edit_options(method, options), Ranks(group)
    asked: dict[str, Any] = {
        "method": method,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "seed": seed,
        "options": chosen,
    }
    ranks.from_main(partial(check_edit, inversion, prompt, **asked))
    check_same_pipeline(pipeline, inversion)
    chosen.check_pipeline(pipeline)
    calibration = inversion.settings["attention"].get("calibration", "none")
    if calibration in CALIBRATIONS:
        logger.warning(
            "%s has calibrated bases; the edit goes on with bases that are not", inversion.path
        )
    device = execution_device(pipeline)
    size = inversion.settings["video"]
    source, negative, target = (
        encode_prompt(pipeline, text, size["height"], size["width"])
        for text in (inversion.settings["prompt"], negative_prompt, prompt)
    )
    of_source = ranks.from_main(inversion.control)
    given = of_source if control is None else control
    controls = checked_controls(pipeline, given, size["num_frames"], size["height"], size["width"])
    if controls:
        source = source.showing(Shown(of_source, inversion.timesteps))
        edited = source.shown[0] if control is None else Shown(controls, inversion.timesteps)
        negative, target = negative.showing(edited), target.showing(edited)
    scale = chosen.guidance if guidance is None else float(guidance)
    job = Job(pipeline, inversion, prompt, source, negative, target, scale, seed, device, ranks)
    check_frames(pipeline, job.num_frames, group=group)
    _check_shared(job)
    settings = edit_settings(
        inversion, prompt, **asked, control=None if control is None else controls
    )
    environment = numeric_environment(pipeline)
    environment["chunk"] = str(job.attention.chunk or job.num_frames)

    def begun() -> tuple[str, Progress | None]:
        run = run_name(inversion, "edit-", settings)
        return run, earlier_run(inversion, run, "edit", environment) if resume else None

    run, found = ranks.from_main(begun)
    work = _METHODS[method](job, chosen)

    visits, scheduler = work.visits, sampling_scheduler(pipeline, job.num_steps)
    total = len(visits)
    place = work.first_step if found is None else found.steps_done

    def keep(step: int, latents: torch.Tensor) -> torch.Tensor | None:
        nonlocal place
        replaced = work.after_step(place, latents)
        latents = latents if replaced is None else replaced
        place += 1
        if resume and ranks.main:
            conditions = running_conditions(pipeline, environment, job.num_frames)
            inversion.save_progress(run, Progress(place, latents, conditions, work.state()))
        if on_step is not None:
            on_step()
        return latents

    shown_at = {quarter * total // 4 for quarter in (1, 2, 3)} if preview and ranks.main else set()

    def predicted(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        prediction = work.predict(step, timestep, latents)
        if place in shown_at and place > work.first_step and preview is not None:
            here = list(preview.frames)
            clean = clean_of(scheduler, prediction[here], timestep, latents[here])
            preview.show(place, total, clean)
        return prediction

    if found is not None:
        work.restore(found.state)
    if found is not None and found.steps_done == total:
        latents = found.latents.to(device)
    else:
        logger.info("%s: editing %d frames in %d steps", method, job.num_frames, total)
        with work.running(), torch.no_grad():
            latents = work.begin() if found is None else found.latents.to(device)
            latents = denoise(
                latents,
                scheduler,
                predicted,
                steps=visits[place:],
                done=place,
                after_step=keep,
                name=f"edit {method}",
                progress=progress and ranks.main,
            )
    told = {name: tensor.cpu() for name, tensor in work.state().items()}
    return Edit(
        latents,
        told.get("masks"),
        told.get("cores"),
        told.get("pivots"),
        settings,
        work.pasted,
    )


def _check_shared(job: Job) -> None:
    """Raise where an inversion's chunks are too few for the ranks."""
    chunk, size = job.attention.chunk or job.num_frames, job.ranks.size
    chunks = -(-job.num_frames // chunk)
    if chunks < size:
        raise ValueError(
            f"{job.inversion.path} was made in {chunks} chunks of {chunk} frames at most, which "
            f"{size} processes cannot share; start {chunks}, or invert again with "
            f"chunk={max(1, job.num_frames // size)} (--chunk)"
        )
