"""The demonstration: inversions of videos whose truth is known, and of a real clip; an edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from stem_kernels.info import provenance

from ..inversion import invert
from ..metrics import Interval, WorldJudge, mean_interval, world_flow
from ..names import INVERSIONS
from ..report.files import write_json
from ..video import Video, read_video
from ..video.clips import shipped_clip
from ..world import render, sample_scene
from ..world.edits import WorldEdit, world_edit
from .comparison import Comparison, compare, result_name
from .edit_plan import EditPlan
from .edits import EditResult, write_edits
from .evaluation import Evaluation, evaluate

NATURAL_CLIP = "carphone_pristine.mp4"  # the embedded model never trained on it
NATURAL_PROMPT = ""  # the embedded model has no words for it
FIRST_SEED = 40_000_000  # of scenes that the embedded model never trained on
EDITED_SEED = 40_500_000  # of the scene that is edited
EDIT_METHOD = "fusion"
FRAMES = 8
WORLD_FPS = 8


@dataclass(frozen=True)
class Demo:
    """What `demo` found.

    Args:
        comparisons: Comparisons by video: "world-1", ..., and the natural clip's name.
        psnr: PSNR in dB over the world videos, by method, "vae" first.
        ssim: SSIM over the world videos, likewise.
        edit: Edit of one more world video, beside its exact answer.
        evaluation: Edit judged under the world's exact flow, by the world's judge.
        json: Path of the figures' file.
    """

    comparisons: dict[str, Comparison]
    psnr: dict[str, Interval]
    ssim: dict[str, Interval]
    edit: EditResult
    evaluation: Evaluation
    json: Path


def demo_videos(count: int, size: int) -> list[tuple[Video, str]]:
    """Some world videos and one natural clip, each with its prompt.

    Args:
        count: Number of world videos, at least 1.
        size: Width and height of all videos in pixels.

    Raises:
        ValueError: no world videos, or no such size.
        FileNotFoundError: the package with the natural clip is not installed.
    """
    if count < 1:
        raise ValueError(f"videos is {count}; it must be at least 1")
    natural = read_video(
        shipped_clip(NATURAL_CLIP), frames=f"0:{FRAMES}", size=(size, size), multiple_of=1
    )
    videos = []
    for index in range(count):
        clip = render(sample_scene(FIRST_SEED + index), FRAMES, size)
        name = f"world-{index + 1}"
        videos.append((Video(clip.frames, Fraction(WORLD_FPS), name=name), clip.caption))
    return [*videos, (natural, NATURAL_PROMPT)]


def demo_edit(size: int) -> WorldEdit:
    """One more world video, whose object gets another colour.

    Args:
        size: Width and height in pixels.
    """
    return world_edit(EDITED_SEED, "colour", FRAMES, size)


def edited_video(edited: WorldEdit) -> Video:
    """The video before the edit."""
    return Video(edited.source.frames, Fraction(WORLD_FPS), name="edited")


def demo(
    pipeline: Any,
    videos: Sequence[tuple[Video, str]],
    edited: WorldEdit,
    out: Path,
    methods: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]],
    num_steps: int,
    model: str | Mapping[str, Any],
    note: str = "",
) -> Demo:
    """Compare inversions of some world videos and of one natural clip, and edit a world video.

    Args:
        pipeline: Pipeline, as for `compare`.
        videos: Videos and prompts, as `demo_videos` gives them.
        edited: Video to edit, as `demo_edit` gives it.
        out: Folder of the comparisons, and of a demo-....json.
        methods: Names of METHODS.
        options: Fields of the methods' configurations, by method.
        num_steps: Number of steps of each inversion and reconstruction.
        model: Name of the pipeline, for the record, or more, as for `invert`.
        note: Note for the documents, as for `compare`.
    """
    settings: dict[str, Any] = {"model": model, "note": note, "num_steps": num_steps}
    comparisons = {
        video.name: compare(pipeline, video, prompt, out, methods, options=options, **settings)
        for video, prompt in videos
    }
    edit = _edited(pipeline, edited, out, options.get("stem"), num_steps, model, note)
    evaluation = _evaluated(edited, edit)
    psnrs, ssims = (_over_world(comparisons, figure) for figure in ("psnr", "ssim"))
    document = {
        **settings,
        "world_videos": len(videos) - 1,
        "frames": FRAMES,
        "pixels": videos[0][0].frames.shape[1],
        "interval": "mean and half-width of its 95 % interval, world videos",
        "psnr": psnrs,
        "ssim": ssims,
        "comparisons": {name: str(found.json) for name, found in comparisons.items()},
        "edit": str(edit.files.json),
        "evaluation": dataclasses.asdict(evaluation),
        "provenance": provenance("diffusers"),
    }
    name = result_name("demo", [found.json.parent.name for found in comparisons.values()])
    path = out / f"{name}.json"
    write_json(path, document)
    return Demo(comparisons, psnrs, ssims, edit, evaluation, path)


def _edited(
    pipeline: Any,
    edited: WorldEdit,
    out: Path,
    options: Mapping[str, Any] | None,
    num_steps: int,
    model: str | Mapping[str, Any],
    note: str,
) -> EditResult:
    video = edited_video(edited)
    inversion = invert(
        pipeline,
        video,
        edited.source.caption,
        out / INVERSIONS,
        options=options,
        num_steps=num_steps,
        model=model,
    )
    plan = EditPlan([edited.exact.caption], [EDIT_METHOD])
    exact = edited.exact.frames
    found = write_edits(pipeline, inversion, plan, out, video=video, exact=exact, note=note)
    return found.results[0]


def _evaluated(edited: WorldEdit, edit: EditResult) -> Evaluation:
    frames, size = edited.source.frames.shape[:2]
    return evaluate(
        edited_video(edited),
        read_video(edit.files.video, multiple_of=1),
        edited.source.caption,
        edit.prompt,
        flow=world_flow(edited.scene, frames, size),
        clip=WorldJudge(),
    )


def _over_world(comparisons: Mapping[str, Comparison], figure: str) -> dict[str, Interval]:
    by_method: dict[str, list[float]] = {}
    for name, found in comparisons.items():
        if name.startswith("world-"):
            for row in found.rows:
                by_method.setdefault(row.method, []).append(getattr(row, figure))
    return {method: mean_interval(values) for method, values in by_method.items()}
