"""Editing a video by a prompt, from its inversion."""

from __future__ import annotations

import dataclasses
import importlib.metadata
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
from ..diffusion.pipeline import decode_latents, encode_prompt, execution_device
from ..diffusion.schedule import sampling_scheduler
from ..distributed import Ranks
from ..inversion import InversionFolder
from ..inversion.folder import Progress
from ..inversion.runs import check_same_pipeline, check_startable, earlier_run, run_name
from ..names import EDIT_METHODS
from .fatezero import FateZero
from .fatezero_options import FateZeroOptions
from .fusion import Fusion, FusionOptions
from .job import Job, Method, Options
from .pnp import PnP, PnPOptions
from .sdedit import SDEdit, SDEditOptions
from .tokenflow import TokenFlow, TokenFlowOptions

logger = logging.getLogger("stem")

_PARTS: tuple[tuple[type[Options], type[Method]], ...] = (
    (PnPOptions, PnP),
    (TokenFlowOptions, TokenFlow),
    (SDEditOptions, SDEdit),
    (FateZeroOptions, FateZero),
    (FusionOptions, Fusion),
)
_METHODS = dict(zip(EDIT_METHODS, _PARTS, strict=True))
METHODS: dict[str, type[Options]] = {name: options for name, (options, _) in _METHODS.items()}
"""The dataclass of each method's options, by the name of the method."""
DEFAULT_METHOD = "fusion"


@dataclass(frozen=True)
class Edit:
    """An edited video, with the masks or pivots that the method used.

    Args:
        latents: Latents [N, c, h, w], float32.
        masks: Masks of the places that may change, bool [N, h, w] in latent cells; None: all may.
        cores: Masks before they were dilated, bool [N, h, w], where a method has them, or None.
        pivots: Frames that TokenFlow drew, int64 [steps, chunks]; None: another method.
        settings: Settings that shaped the latents, as JSON types.
    """

    latents: torch.Tensor
    masks: torch.Tensor | None
    cores: torch.Tensor | None
    pivots: torch.Tensor | None
    settings: dict[str, Any]


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
    """Edit a video by a prompt: `edit_latents`, decoded.

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
    latents = edit_latents(
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
    return decode_latents(pipeline, latents)


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

    Raises:
        ValueError, InversionError, NonFiniteError: as `edit_latents`.
    """
    chosen, ranks = edit_options(method, options), Ranks(group)
    ranks.from_main(
        partial(
            check_edit,
            inversion,
            prompt,
            method=method,
            negative_prompt=negative_prompt,
            guidance=guidance,
            seed=seed,
            options=chosen,
        )
    )
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
        inversion,
        prompt,
        method=method,
        negative_prompt=negative_prompt,
        guidance=guidance,
        seed=seed,
        options=chosen,
        control=None if control is None else controls,
    )
    environment = numeric_environment(pipeline)
    environment["chunk"] = str(job.attention.chunk)

    def begun() -> tuple[str, Progress | None]:
        run = run_name(inversion, "edit-", settings)
        return run, earlier_run(inversion, run, "edit", environment) if resume else None

    run, found = ranks.from_main(begun)
    work = _METHODS[method][1](job, chosen)

    def keep(step: int, latents: torch.Tensor) -> torch.Tensor | None:
        replaced = work.after_step(step, latents)
        latents = latents if replaced is None else replaced
        if resume and ranks.main:
            inversion.save_progress(run, Progress(step + 1, latents, environment, work.state()))
        if on_step is not None:
            on_step()
        return latents

    total = job.num_steps
    if found is not None:
        work.restore(found.state)
    if found is not None and found.steps_done == total:
        latents = found.latents.to(device)
    else:
        logger.info("%s: editing %d frames in %d steps", method, job.num_frames, total)
        with work.running(), torch.no_grad():
            latents = work.begin() if found is None else found.latents.to(device)
            first = work.first_step if found is None else found.steps_done
            latents = denoise(
                latents,
                sampling_scheduler(pipeline, total),
                work.predict,
                steps=range(first, total),
                after_step=keep,
                name=f"edit {method}",
                progress=progress and ranks.main,
            )
    told = {name: tensor.cpu() for name, tensor in work.state().items()}
    return Edit(latents, told.get("masks"), told.get("cores"), told.get("pivots"), settings)


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


def edit_options(method: str, options: Options | Mapping[str, Any] | None) -> Options:
    """The options of a method, checked.

    Args:
        method: Name of the method.
        options: Its options, or some of their fields by name (JSON types are taken), or None.

    Raises:
        ValueError: the method or an option is unknown, or an option refuses its value.
        TypeError: the options are those of another method.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    kind = METHODS[method]
    if isinstance(options, kind):
        return options
    if isinstance(options, Options):
        raise TypeError(f"options are {type(options).__name__}; {method} takes {kind.__name__}")
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in options or {}:
        if name not in fields:
            raise ValueError(f"{method} has no option {name!r}; it has {', '.join(fields)}")
    return kind(**(options or {}))


def check_edit(
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str = DEFAULT_METHOD,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: Options | Mapping[str, Any] | None = None,
) -> None:
    """Check, without a pipeline, that `run_edit` can begin.

    Args:
        inversion: Inversion to start from.
        prompt: Prompt that describes the edited video.
        method: Name of the method.
        negative_prompt: Negative prompt, used with guidance only.
        guidance: Classifier-free guidance scale, or None.
        seed: Seed of the method's random numbers.
        options: Options of the method.

    Raises:
        TypeError: a prompt is not a text, or the options are those of another method.
        ValueError: a setting does not fit.
        InversionError: the inversion is incomplete.
    """
    chosen = edit_options(method, options)
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise TypeError(f"{name} is a {type(text).__name__}; it must be one text")
    if not prompt.strip():
        raise ValueError("the prompt is empty; describe the video as it is to be")
    check_numbers(guidance, seed)
    check_startable(inversion)
    chosen.check(inversion, prompt)


def check_numbers(guidance: float | None, seed: int) -> None:
    """Raise ValueError where a guidance scale or a seed cannot be used."""
    number = isinstance(guidance, (int, float)) and not isinstance(guidance, bool)
    if guidance is not None and not (number and 0.0 <= guidance < float("inf")):
        raise ValueError(f"guidance is {guidance!r}; it must be a finite number of at least 0")
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of 64 bits")


def edit_settings(
    inversion: InversionFolder,
    prompt: str,
    *,
    method: str,
    negative_prompt: str,
    guidance: float | None,
    seed: int,
    options: Options,
    control: Sequence[Control] | None = None,
) -> dict[str, Any]:
    """Everything that shapes an edit beside its inversion, as JSON types."""
    scale = options.guidance if guidance is None else float(guidance)
    shown = {} if control is None else {"control": [each.record() for each in control]}
    return {
        **shown,
        "inversion": inversion.path.name,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "method": method,
        "guidance": scale,
        "seed": seed,
        "options": _as_json(dataclasses.asdict(options)),
        "version": importlib.metadata.version("stem-inversion"),
    }


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _as_json(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_as_json(inner) for inner in value]
    return value
