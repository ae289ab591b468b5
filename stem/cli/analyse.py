"""The command that follows features along the flow, `stem analyse`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..names import FLOWS
from .app import app, console, print_note, say
from .arguments import (
    chunk_of,
    one_of,
)
from .ranks import ranks
from .request import Request, read_options
from .run_options import OF_MOTION, RunOptions, takes_run_options

if TYPE_CHECKING:
    from ..metrics import Flow
    from ..video import Video

WORLD = "world:"
_WORLD_MULTIPLE = 8  # a side that every model's VAE takes as it is


@app.command("analyse")
@takes_run_options(without=OF_MOTION, methods="ddim,stem", out=Path("out/analyse"))
def analyse_command(
    video: Annotated[
        Path,
        typer.Argument(
            help=f"Any video file that FFmpeg reads, or {WORLD}SEED, a video of the package's own "
            "world with its caption: 8 frames of 64x64 pixels without --frames and --size."
        ),
    ],
    run: RunOptions,
    flow: Annotated[
        str | None,
        typer.Option(
            help=f"Of the video: {', '.join(FLOWS)}. Default: a world video's exact flow, else "
            "raft where its weights are on this machine, else dis.",
            callback=one_of(FLOWS),
        ),
    ] = None,
    timestep: Annotated[
        int | None, typer.Option(help="Shown in the picture, or the nearest. Default: the middle.")
    ] = None,
) -> None:
    """How steady an inversion's features are along the video's flow: picture, plot, figures.

    It writes analysis.png, analysis-plot.png and analysis.json. An interrupted run starts again.
    """
    from ..video import read_video
    from ..workflows.analysis import analyse, check_analysable
    from .tables import analysis_table

    request = Request.checked(run)
    prompt, known = run.prompt, cast("str | Flow | None", flow)
    if str(video).startswith(WORLD) and not video.exists():
        clip, caption, exact = world_video(str(video), run.frames or "8", run.size or "64")
        prompt, known = prompt or caption, flow or exact
    else:
        clip = read_video(video, **read_options(run), multiple_of=1)
    check_analysable(clip, request.methods, request.options)
    with ranks(run.device) as group, run.parking(run.out):
        pipeline, clip = request.load_for(clip, video)
        found = analyse(
            pipeline,
            clip,
            prompt,
            run.out,
            request.methods,
            options=request.options,
            flow=known,
            timestep=timestep,
            num_steps=run.steps,
            chunk=chunk_of(run.chunk),
            model=request.model,
            control=request.control(pipeline, clip, run),
            note=request.note,
            group=group,
        )
    console.print(analysis_table(found))
    say(f"flow: {found.flow.name}; the former frame's features, warped, against the current one's")
    for path in (found.sheet, found.plot, found.json):
        say(path)
    print_note(request.note)


def world_video(text: str, frames: str, size: str) -> tuple[Video, str, Flow]:
    """A world video with its caption and its exact flow.

    Args:
        text: Text world:SEED.
        frames: Number of frames.
        size: Width and height in pixels.

    Raises:
        typer.BadParameter: one of them is no such number.
    """
    from ..metrics import world_flow
    from ..video import Video
    from ..world import render, sample_scene

    seed = text.removeprefix(WORLD)
    if (
        not all(number.isdecimal() for number in (seed, frames, size))
        or int(size) % _WORLD_MULTIPLE
    ):
        raise typer.BadParameter(
            f"{text!r} with --frames {frames} and --size {size}; a world video takes a seed, a "
            f"number of frames, and one number of pixels, a multiple of {_WORLD_MULTIPLE}"
        )
    scene = sample_scene(int(seed))
    count, side = int(frames), int(size)
    if count < 2:
        raise typer.BadParameter(f"--frames {frames}; one frame has no flow, take at least 2")
    drawn = render(scene, count, side)
    clip = Video(drawn.frames, Fraction(count), name=f"world-{seed}")
    return clip, drawn.caption, world_flow(scene, count, side)
