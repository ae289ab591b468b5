"""One edit of the editing study: inverted, edited, and compared with the exact answer."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import max_pool2d

from stem import Control, InversionFolder, Video, invert
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.editing import edit_options, run_edit
from stem.editing.pasting import edited_frames
from stem.metrics import mask_overlap, pooled_psnr, warp_error
from stem.world import Clip, WorldEdit, judge, world_edit
from stem_kernels.measure import PeakMemory

from ..quality.measure import model
from .variants import CEILING, UNEDITED, VARIANTS, Series

STEPS = 10
FPS = Fraction(8)
FIRST_SEED = 42_000_000
"""Of the study's scenes; those of training, of the card and of the other studies lie below."""

Row = dict[str, float | None]


@dataclass(frozen=True)
class Edited:
    """What an editor gives.

    Args:
        frames: Edited video, uint8 [N, H, W, 3].
        masks: Where the video may have changed, bool [N, h, w]; None: no mask.
        cores: `masks` before they were dilated, bool [N, h, w]; None: no mask.
        seconds: Time of the edit, without the inversion and without decoding.
        extra_bytes: Peak memory of the edit above where it stood; None: not known.
    """

    frames: torch.Tensor
    masks: torch.Tensor | None = None
    cores: torch.Tensor | None = None
    seconds: float = 0.0
    extra_bytes: int | None = None


Editor = Callable[[Series, WorldEdit, Callable[[str], InversionFolder]], Edited]
"""(series, edit, the inversion of its source by name) -> what the series' variant makes of it."""


def inversions(
    source: Clip, root: Path, pipeline: Any = None, control: Control | None = None
) -> Callable[[str], InversionFolder]:
    """The inversions of a clip below `root` by name, made where they are not there yet.

    Args:
        source: Clip to invert.
        root: Folder of the inversions.
        pipeline: Pipeline; None: the embedded one.
        control: What its ControlNet is shown, where it has one.
    """

    def inversion(name: str) -> InversionFolder:
        video = Video(source.frames, FPS)
        return invert(
            pipeline or model(),
            video,
            source.caption,
            root,
            method=name,
            num_steps=STEPS,
            chunk=None,
            control=control,
            progress=False,
        )

    return inversion


def with_stem(
    series: Series, edit: WorldEdit, inversion: Callable[[str], InversionFolder]
) -> Edited:
    """The editor that the study measures: `stem.editing.run_edit`."""
    return edited_by(model(), series, edit, inversion(series.inversion))


def edited_by(
    pipeline: Any,
    series: Series,
    edit: WorldEdit,
    folder: InversionFolder,
    control: Control | None = None,
) -> Edited:
    """What `stem.editing.run_edit` makes of an edit.

    Args:
        pipeline: Pipeline that the inversion was made with.
        series: Series of the edit.
        edit: Edit.
        folder: Inversion of its source.
        control: What the pipeline's ControlNet is shown in the edit; None: as in the inversion.
    """
    variant = VARIANTS[series.variant]
    options = edit_options(variant.method, variant.options_for(edit))
    start = time.perf_counter()
    with PeakMemory() as memory:
        found = run_edit(
            pipeline,
            folder,
            edit.exact.caption,
            method=variant.method,
            guidance=variant.guidance,
            options=options,
            control=control,
            resume=False,
            progress=False,
        )
    seconds = time.perf_counter() - start
    frames = edited_frames(pipeline, folder, found, edit.source.frames)
    return Edited(frames, found.masks, found.cores, seconds, memory.extra_bytes)


@dataclass(frozen=True)
class Job:
    """What is measured in one go: series of one scene, which share its inversions.

    Args:
        seed: Seed of the scene.
        series: Series, all of one kind and number of frames.
    """

    seed: int
    series: tuple[Series, ...]


def measure(job: Job, root: Path, editor: Editor = with_stem) -> dict[str, Row]:
    """The figures of a job by the name of the series.

    Args:
        job: What to measure.
        root: Folder for the inversions, which later jobs of the same scene take up again.
        editor: Editor to measure.
    """
    first = job.series[0]
    edit = world_edit(job.seed, first.kind, first.frames)
    inversion = inversions(edit.source, root / str(os.getpid()))
    return {
        series.name: figures(edit, answer(series, edit, inversion, editor)) for series in job.series
    }


def answer(
    series: Series, edit: WorldEdit, inversion: Callable[[str], InversionFolder], editor: Editor
) -> Edited:
    """What a series makes of an edit; its references are a video through the autoencoder."""
    if series.variant == CEILING:
        return Edited(through_vae(edit.exact.frames))
    if series.variant == UNEDITED:
        return Edited(through_vae(edit.source.frames))
    return editor(series, edit, inversion)


def through_vae(frames: torch.Tensor) -> torch.Tensor:
    """Frames uint8 [N, H, W, 3] through the embedded model's autoencoder and back."""
    return decode_latents(model(), encode_frames(model(), frames))


def figures(edit: WorldEdit, edited: Edited) -> Row:
    """An edit against its exact answer, by figure, each rounded to five digits.

    `all`, `inside` and `outside` are PSNR in dB, of the whole video and of `WorldEdit.region`;
    `warp` is Warp-Err under the exact flow of the edited scene; `colour` and `shape` are the
    shares of frames in which the judge sees what the target prompt says; `overlap` is the IoU of
    `cores` and the latent cells that the object touches before or after; `seconds` and `mebibytes`
    are those of the edit.
    """
    frames, exact = edited.frames, edit.exact
    verdicts = [judge(frame) for frame in frames]
    found = {
        "all": pooled_psnr(frames, exact.frames),
        "inside": pooled_psnr(frames, exact.frames, edit.region),
        "outside": pooled_psnr(frames, exact.frames, ~edit.region),
        "warp": warp_error(frames, exact.flow, exact.occlusion),
        "colour": statistics.fmean(
            seen is not None and seen.colour == edit.colour for seen in verdicts
        ),
        "shape": statistics.fmean(
            seen is not None and seen.shape == edit.shape for seen in verdicts
        ),
        "overlap": None if edited.cores is None else overlap(edited.cores, edit.objects),
        "seconds": edited.seconds or None,
        "mebibytes": None if edited.extra_bytes is None else edited.extra_bytes / 2**20,
    }
    return {name: None if value is None else float(f"{value:.5g}") for name, value in found.items()}


def overlap(cores: torch.Tensor, objects: torch.Tensor) -> float:
    """IoU of a mask [N, h, w] and the cells that objects, a mask [N, H, W] of pixels, touch."""
    factor = objects.shape[1] // cores.shape[1]
    touched = max_pool2d(objects.float()[:, None], factor)[:, 0] > 0
    return mask_overlap(cores.cpu(), touched)
