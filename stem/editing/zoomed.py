"""Edits of small things: inverted and edited in a window that follows them, and put back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..attention import Hooks
from ..attention.waiting.parked import current_parking
from ..diffusion.pipeline import decoded_in_turns, encode_prompt, execution_device
from ..distributed import Ranks
from ..inversion import InversionFolder, invert
from ..inversion.methods import arguments_of, attention_on, inversion_scenes
from ..inversion.records import FramesInParts, check_same_size
from ..inversion.runs import check_same_pipeline
from .checks import check_edit, check_text, edit_options
from .job import Edit, Job, Options
from .methods.difference_mask import difference_map
from .methods.fusion import FusionOptions
from .regions.zoom import MOST, Zoom, ZoomedVideo
from .run import Preview, run_edit

logger = logging.getLogger("stem")

METHOD = "fusion"
"""Name of the method whose edits are zoomed."""


def run_zoomed_edit(
    pipeline: Any,
    inversion: InversionFolder,
    prompt: str,
    root: str | Path,
    *,
    video: FramesInParts | None = None,
    zoom_prompt: str | None = None,
    zoom_source: str | None = None,
    negative_prompt: str = "",
    guidance: float | None = None,
    seed: int = 0,
    options: Options | Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    resume: bool = True,
    progress: bool = True,
    on_step: Callable[[], None] | None = None,
    preview: Preview | None = None,
) -> Edit:
    """Edit by `fusion` what is small in a video, in a window in which it is large.

    A model draws what has some cells of its latents badly, and its autoencoder keeps little of it.
    The mask of the edit says where the thing is; a window that follows it is inverted as a video of
    its own, with the inversion's settings, and edited; the frames of the edit take from the window
    what lies inside the mask there.

    Scenes in which a window would have more than 0.65 of a frame's side, and those in which nothing
    changes, are edited by `run_edit` with `prompt`.

    Args:
        pipeline: Pipeline that the inversion was made with.
        inversion: Inversion of the whole video, complete.
        prompt: Prompt that describes the edited video, whole frames of it.
        root: Folder below which the window's inversion gets one of its own, or is taken up.
        video: Video that was inverted; None: what the VAE makes of the inversion's latents, of
            which a window shows little more than of whole frames.
        zoom_prompt: Prompt that describes the edited video as the window shows it, where what is
            small is large; None: `prompt`.
        zoom_source: Prompt that describes the source likewise; None: the inversion's.
        negative_prompt: Negative prompt.
        guidance: Guidance scale, or None.
        seed: Seed of the method's random numbers.
        options: Options of `fusion`.
        group: Process group whose ranks share the frames; all ranks make this call.
        resume: Whether to keep the latents reached so far, and to go on from them.
        progress: Whether to show progress.
        on_step: Function called after each step of the window's inversion and of the edit.
        preview: Who wants to see the edit while it runs, in the window.

    Returns:
        The edit in the window, with its zoom; masks and cores are those of whole frames. The entry
        "zoom" of its settings names the window's inversion, prompts and sizes, or is None where
        there was no window.

    Raises:
        ValueError, TypeError, InversionError, NonFiniteError: as `run_edit`; also an edit without
            a mask, an inversion with control, or a prompt of the window that cannot be used.
        OSError: `root` cannot be written.
    """
    chosen, ranks = edit_options(METHOD, options), Ranks(group)
    assert isinstance(chosen, FusionOptions)
    asked: dict[str, Any] = {
        "method": METHOD,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "seed": seed,
        "options": chosen,
    }
    described, wanted = ranks.from_main(
        partial(_checked, inversion, prompt, zoom_prompt, zoom_source, video, asked)
    )
    check_same_pipeline(pipeline, inversion)
    about = inversion.settings["video"]
    cores = _cores(pipeline, inversion, prompt, chosen, ranks)
    scenes = inversion_scenes(inversion)
    zoom = Zoom.of(cores, scenes)
    run: dict[str, Any] = {
        "group": group,
        "resume": resume,
        "progress": progress,
        "on_step": on_step,
        "preview": preview,
    }
    if zoom is None:
        if cores.any():
            logger.info("a window would have more than %s of a frame's side: no zoom", MOST)
        else:
            logger.info("the prompts differ nowhere in the video: no zoom")
        found = run_edit(pipeline, inversion, prompt, **asked, **run)
        return dataclasses.replace(found, settings={**found.settings, "zoom": None})
    windowed = zoom.shares < 1
    logger.info(
        "zoom: windows of %.0f %% of a frame's side, in %d of %d scenes",
        100 * float(zoom.shares[windowed].mean()),
        sum(bool(windowed[scene.start]) for scene in scenes),
        len(scenes),
    )
    whole = None
    if not windowed.all():
        whole = run_edit(pipeline, inversion, prompt, **asked, **run)

    def frames(count: int) -> Iterator[torch.Tensor]:
        if video is not None:
            return video.parts(count)
        return decoded_in_turns(pipeline, inversion.x0())

    shown = ZoomedVideo(
        frames, zoom, about["num_frames"], about["height"], about["width"], Fraction(about["fps"])
    )
    how = arguments_of(inversion)
    window = invert(
        pipeline, shown, described, root, **how, group=group, progress=progress, on_step=on_step
    )
    found = run_edit(pipeline, window, wanted, **asked, **run)
    if whole is not None:
        found = _joined(windowed, found, whole)
    assert found.masks is not None
    assert found.cores is not None
    return dataclasses.replace(
        found,
        masks=zoom.masks_of_frames(found.masks),
        cores=zoom.masks_of_frames(found.cores),
        settings={
            **found.settings,
            "inversion": inversion.path.name,
            "prompt": prompt,
            "zoom": {
                "inversion": window.path.name,
                "prompt": wanted,
                "source_prompt": described,
                "shares": [round(float(share), 4) for share in zoom.shares],
            },
        },
        pasted=True,
        zoom=zoom,
        zoomed_masks=found.masks.cpu(),
    )


def _joined(windowed: torch.Tensor, found: Edit, whole: Edit) -> Edit:
    """An edit whose frames are one's where `windowed`, bool [N], and another's elsewhere."""

    def chosen(here: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(here.to(one.device).view(-1, *[1] * (one.ndim - 1)), one, other)

    def joined(name: str) -> torch.Tensor:
        both = (getattr(edit, name) for edit in (found, whole))
        return current_parking().by_frames(chosen, windowed, *both)

    return dataclasses.replace(
        found, latents=joined("latents"), masks=joined("masks"), cores=joined("cores")
    )


def check_zoom(
    methods: Sequence[str],
    options: Mapping[str, Options | Mapping[str, Any] | None],
    control: object = None,
) -> FusionOptions:
    """The options of edits in a window; raises ValueError where they cannot be made.

    Args:
        methods: Names of their methods.
        options: Options by method.
        control: What the pipeline's ControlNets were or are to be shown, or None.
    """
    others = [method for method in methods if method != METHOD]
    if others:
        raise ValueError(f"a zoom follows the mask of {METHOD}; {', '.join(others)} has none")
    chosen = edit_options(METHOD, options.get(METHOD))
    assert isinstance(chosen, FusionOptions)
    if not chosen.mask:
        raise ValueError(
            f"a zoom follows the mask of {METHOD}, which these options turn off: {chosen}; take "
            "another preset, or mask=True"
        )
    if not chosen.paste:
        raise ValueError("a zoom is pasted into the source's frames, and paste is False; leave it")
    if control:
        raise ValueError(
            "a zoom has no control, whose pictures have no window; edit without a zoom"
        )
    return chosen


def zoom_prompts(
    inversion: InversionFolder,
    prompt: str,
    options: FusionOptions,
    zoom_prompt: str | None,
    zoom_source: str | None,
) -> tuple[str, str]:
    """The prompts of the source and of the edited video as a window shows them, checked.

    Args:
        inversion: Inversion of the whole video.
        prompt: Prompt that describes the edited video, whole frames of it.
        options: Options of `fusion`.
        zoom_prompt: Prompt of the edited video that is given for the window; None: `prompt`.
        zoom_source: Prompt of the source likewise; None: the inversion's.

    Raises:
        TypeError: one is no text.
        ValueError: the second is empty, or they cannot be mapped word to word as asked.
    """
    for name, text in (("zoom_prompt", zoom_prompt), ("zoom_source", zoom_source)):
        if text is not None:
            check_text(name, text)
    if zoom_prompt is not None:
        check_zoom_prompt(zoom_prompt)
    source = inversion.settings["prompt"] if zoom_source is None else zoom_source
    wanted = prompt if zoom_prompt is None else zoom_prompt
    try:
        options.check_words(source, wanted)
    except ValueError as error:
        raise ValueError(f"in the window (zoom_source, zoom_prompt): {error}") from error
    return source, wanted


def check_zoom_prompt(text: str) -> None:
    """Raise ValueError where a prompt of the window is empty."""
    if not text.strip():
        raise ValueError(
            f"a zoom_prompt is {text!r}; describe the edited video as its window shows it, or "
            "leave it out"
        )


def _checked(
    inversion: InversionFolder,
    prompt: str,
    zoom_prompt: str | None,
    zoom_source: str | None,
    video: FramesInParts | None,
    asked: dict[str, Any],
) -> tuple[str, str]:
    """The prompts of the window; raises where the edit cannot begin."""
    check_edit(inversion, prompt, **asked)
    options = check_zoom([METHOD], {METHOD: asked["options"]}, inversion.settings.get("control"))
    if video is not None:
        check_same_size(video, inversion.settings["video"])
    return zoom_prompts(inversion, prompt, options, zoom_prompt, zoom_source)


def _cores(
    pipeline: Any,
    inversion: InversionFolder,
    prompt: str,
    options: FusionOptions,
    ranks: Ranks,
) -> torch.Tensor:
    """Where a prompt and the inversion's own differ in the video, bool [N, h, w]."""
    size = inversion.settings["video"]
    of_source, empty, of_target = (
        encode_prompt(pipeline, text, size["height"], size["width"])
        for text in (inversion.settings["prompt"], "", prompt)
    )
    device = execution_device(pipeline)
    job = Job(pipeline, inversion, prompt, of_source, empty, of_target, 1.0, 0, device, ranks)
    hooks = Hooks()
    with attention_on(pipeline, job.attention, ranks.group, hooks=hooks), torch.no_grad():
        found = difference_map(job, hooks, *options.mask_levels)
    return found > options.mask_threshold
