"""The options that say what ControlNets are shown, and what their texts mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import say

if TYPE_CHECKING:
    import torch

    from ..control import Control
    from ..sources import ModelSource
    from ..video import Video, VideoFile
    from .run_options import RunOptions

CANNY, DEPTH = "canny", "depth"
OF_CONTROL = ("control", "control_scale", "control_start", "control_end", "depth_model")
"""Parameters that say what ControlNets are shown while inverting."""
_PARTS = 8  # frames that are decoded at once

Controls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="canny|depth|FILE",
        help="What a ControlNet is shown, one for each --controlnet, in their order: the video's "
        "edges or depth, or FILE, a video or a folder of pictures that is read as the video is "
        "(--frames, --size).",
    ),
]
ControlScales = Annotated[
    list[float] | None, typer.Option(help="One for each --controlnet, or one for all. Default: 1.")
]
ControlStarts = Annotated[
    list[float] | None,
    typer.Option(
        help="Share of the steps, the noisiest first, before which a ControlNet is off; likewise."
    ),
]
ControlEnds = Annotated[
    list[float] | None,
    typer.Option(help="Share of the steps after which a ControlNet is off; likewise."),
]
DepthModel = Annotated[
    str | None,
    typer.Option(
        metavar="ID|FOLDER",
        help="Of --control depth: a model of transformers that is on this machine. Default: "
        "Intel/dpt-hybrid-midas.",
    ),
]
EditControls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="What a ControlNet is shown in the edit, one for each --controlnet: a video or a "
        "folder of pictures, a picture for each frame. Default: what it is shown in the inversion.",
    ),
]
EditControlScales = Annotated[
    list[float] | None,
    typer.Option(
        help="In the edit, one for each --controlnet, or one for all. Default: as in the inversion."
    ),
]


def check_control(run: RunOptions, source: ModelSource) -> None:
    """Raise where the options of control do not fit each other, before any model is loaded.

    Args:
        run: Options of the command.
        source: Model with its ControlNets.

    Raises:
        typer.BadParameter: with the option.
        ValueError: a scale or a share that means nothing, or a depth model that is not here.
    """
    from ..control.control import check_numbers
    from ..control.depth import check_model

    texts, nets = run.control or [], len(source.controlnets)
    if len(texts) != nets and not (nets == 0 and _may_have_own(source)):
        raise typer.BadParameter(
            f"there are {len(texts)} for {nets} ControlNets; give one for each --controlnet",
            param_hint="--control",
        )
    for scale, start, end in zip(*_numbers(run, len(texts)), strict=True):
        check_numbers(scale, start, end)
    for text in texts:
        _check_path(text, "--control", (CANNY, DEPTH))
    if DEPTH in texts:
        check_model(_depth_model(run))
    elif run.depth_model is not None:
        raise typer.BadParameter("it goes with --control depth", param_hint="--depth-model")


def _may_have_own(source: ModelSource) -> bool:
    """Whether a model may be a pipeline that has ControlNets already."""
    if source.is_file or source.is_built_in:
        return False
    folder = Path(source.name)
    parts = ("controlnet", "adapter")
    return not folder.is_dir() or any((folder / part).is_dir() for part in parts)


def read_control(
    run: RunOptions, clip: Video | VideoFile, multiple_of: int, device: Any
) -> list[Control]:
    """What each ControlNet is shown of a clip.

    Args:
        run: Options of the command, checked.
        clip: Clip as it is inverted.
        multiple_of: Number that its width and height are multiples of.
        device: Device that a depth model runs on.

    Raises:
        ValueError: a file that cannot be read, or pictures that do not fit the clip.
    """
    from ..control import Control

    texts = run.control or []
    numbers = zip(*_numbers(run, len(texts)), strict=True)
    return [
        Control(
            _pictures(text, run, clip, multiple_of, device), scale, start, end, _named(text, run)
        )
        for text, (scale, start, end) in zip(texts, numbers, strict=True)
    ]


def control_of_edit(
    texts: list[str] | None,
    scales: list[float] | None,
    own: Sequence[Control],
    num_frames: int,
    height: int,
    width: int,
) -> list[Control] | None:
    """What each ControlNet is shown in an edit; None: the same as in the inversion.

    Args:
        texts: Texts of --edit-control.
        scales: Numbers of --edit-control-scale.
        own: What each was shown in the inversion.
        num_frames: Number of frames of the video.
        height: Height of its frames in pixels.
        width: Width of its frames in pixels.

    Raises:
        typer.BadParameter: there are not as many as ControlNets.
        ValueError: a file that cannot be read, or has another number of frames.
    """
    if not texts and not scales:
        return None
    check_edit_control(texts, scales, len(own))
    kept = [each.scale for each in own]
    chosen = _each("--edit-control-scale", scales, len(own), 1.0) if scales else kept
    found = [dataclasses.replace(c, scale=scale) for c, scale in zip(own, chosen, strict=True)]
    for number, text in enumerate(texts or []):
        pictures = _read(text, size=(width, height), multiple_of=1)
        found[number] = dataclasses.replace(found[number], pictures=pictures, source=text)
    for each in found:
        each.check_fits(num_frames, height, width)
    return found


def check_edit_control(texts: list[str] | None, scales: list[float] | None, count: int) -> None:
    """Raise where the options of an edit's control do not fit so many ControlNets.

    Args:
        texts: Texts of --edit-control.
        scales: Numbers of --edit-control-scale.
        count: Number of ControlNets.

    Raises:
        typer.BadParameter: with the option.
        ValueError: a scale that means nothing.
    """
    from ..control.control import check_numbers

    if texts and len(texts) != count:
        raise typer.BadParameter(
            f"there are {len(texts)} for {count} ControlNets; give one for each",
            param_hint="--edit-control",
        )
    for text in texts or []:
        _check_path(text, "--edit-control", ())
    for scale in _each("--edit-control-scale", scales, count, 1.0):
        check_numbers(scale, 0.0, 1.0)


def _numbers(run: RunOptions, count: int) -> tuple[list[float], ...]:
    return (
        _each("--control-scale", run.control_scale, count, 1.0),
        _each("--control-start", run.control_start, count, 0.0),
        _each("--control-end", run.control_end, count, 1.0),
    )


def _each(option: str, given: list[float] | None, count: int, default: float) -> list[float]:
    numbers = given or [default]
    if given and count == 0:
        raise typer.BadParameter("it goes with --controlnet and --control", param_hint=option)
    if len(numbers) not in (1, count):
        raise typer.BadParameter(
            f"there are {len(numbers)} for {count} ControlNets; give one for each, or one for all",
            param_hint=option,
        )
    return numbers * count if len(numbers) == 1 else numbers


def _check_path(text: str, option: str, words: tuple[str, ...]) -> None:
    if text not in words and not Path(text).exists():
        raise typer.BadParameter(
            f"{text!r}: there is no such file or folder; name a video or a folder of pictures"
            + (f", or take {' or '.join(words)}" if words else ""),
            param_hint=option,
        )


def _pictures(
    text: str, run: RunOptions, clip: Video | VideoFile, multiple_of: int, device: Any
) -> torch.Tensor:
    import torch

    from ..control import canny, depth

    if text == CANNY:
        return torch.cat([canny(part) for part in clip.parts(_PARTS)])
    if text == DEPTH:
        frames = torch.cat(list(clip.parts(_PARTS)))
        return depth(frames, _depth_model(run), device)
    return _read(text, frames=run.frames, size=run.size, multiple_of=multiple_of)


def _read(text: str, **options: Any) -> torch.Tensor:
    from ..video import read_pictures, read_video

    found = (read_pictures if Path(text).is_dir() else read_video)(text, **options)
    for note in found.notes:
        say(f"{found.name}: {note}")
    return found.frames


def _named(text: str, run: RunOptions) -> str:
    return f"depth of {_depth_model(run)}" if text == DEPTH else text


def _depth_model(run: RunOptions) -> str:
    from ..control.depth import DEPTH_MODEL

    return run.depth_model or DEPTH_MODEL
